#include <cstdio>
#include <vector>
#include <random>
#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include "cuda/kernels.h"
#include "cuda/device.h"
#include "cuda/common/tile.cuh"
#include "cuda/common/query_place.cuh"
using namespace sparline; using namespace sparline::cuda;
namespace sparline::cuda { CurrentDevice current_device(){ int n; cudaDeviceGetAttribute(&n,cudaDevAttrMultiProcessorCount,0); return {90,n}; } }
#define CK(x) do{auto e=(x);if(e!=cudaSuccess){printf("err %s line %d\n",cudaGetErrorString(e),__LINE__);exit(1);}}while(0)
template<class T> T* dalloc(size_t n){T*p;CK(cudaMalloc(&p,n*sizeof(T)));return p;}
template<class T> T* up(const std::vector<T>&v){T*p=dalloc<T>(v.size());CK(cudaMemcpy(p,v.data(),v.size()*sizeof(T),cudaMemcpyHostToDevice));return p;}
template<class T> __global__ void fill(T*p,size_t n,uint32_t seed,float scale){
  for(size_t i=blockIdx.x*size_t(blockDim.x)+threadIdx.x;i<n;i+=size_t(gridDim.x)*blockDim.x){
    uint64_t x=(i+1)*0x9E3779B97F4A7C15ull^(uint64_t(seed)*0xD1B54A32D192ED03ull);x^=x>>29;x*=0xBF58476D1CE4E5B9ull;x^=x>>32;x*=0x94D049BB133111EBull;x^=x>>29;
    float u=((x>>40)+0.5f)/16777216.f,v=((x&0xffffff)+0.5f)/16777216.f;
    float g=sqrtf(-2*logf(u))*cospif(2*v)*scale; if constexpr(sizeof(T)==4)p[i]=g; else p[i]=from_float<T>(g);} }
// reference: one block a row
template<class T> __global__ void ref(SparseForward p,const T*o_before,float*out,float*lse,int phi_map){
  int row=blockIdx.x%p.frame.queries.length, bh=blockIdx.x/p.frame.queries.length; int H=p.frame.num_heads,D=p.frame.head_dim,b=bh/H,h=bh%H,hk=h/p.frame.group();
  int i=0; BlockInfo blk; for(i=0;i<p.frame.queries.num_blocks;++i){blk=p.frame.queries.block(i); if(row>=blk.begin&&row<blk.begin+blk.rows)break;}
  if(threadIdx.x) return;
  const T*q=p.q.row<const T>(b,h,row);
  double acc[128]={},m=-INFINITY,l=0;
  bool none=p.is_protected_only&&!blk.is_protected;
  for(int pass=0;pass<2&&!none;++pass)
  for(int j=blk.other_begin;j<blk.other_end;++j){ BlockInfo kb=p.frame.keys.block(j);
    if(!(p.map.sparse_weight(b,h,i,j,blk.is_protected||kb.is_protected)>0))continue;
    for(int c=kb.begin;c<kb.begin+kb.rows;++c){ const T*k=p.k.row<const T>(b,hk,c); float s=0; for(int d=0;d<D;++d)s+=to_float(q[d])*to_float(k[d]); double S=double(s)*p.scale;
      if(pass==0)m=fmax(m,S); else{double e=exp(S-m);l+=e;const T*v=p.v.row<const T>(b,hk,c);for(int d=0;d<D;++d)acc[d]+=e*to_float(v[d]);} } }
  double a=1,o[128]; for(int d=0;d<D;++d)o[d]=l>0?acc[d]/l:0;
  lse[bh*(size_t)p.frame.queries.length+row]=l>0?m+log(l):-INFINITY;
  const LinearTail&t=p.linear;
  if(t.is_on&&!blk.is_protected){
    double phi[128];
    if(phi_map==0){double mx=-1e30,sm=0;for(int d=0;d<D;++d)mx=fmax(mx,(double)to_float(q[d]));for(int d=0;d<D;++d){phi[d]=exp(to_float(q[d])-mx);sm+=phi[d];}for(int d=0;d<D;++d)phi[d]/=sm;}
    else for(int d=0;d<D;++d){double x=to_float(q[d]);phi[d]=phi_map==1?(x>0?x+1:exp(x)):(x>0?x:0);}
    const float*z=t.sums_z+(bh*(size_t)p.frame.queries.num_blocks+i)*D;
    double den=t.epsilon;for(int d=0;d<D;++d)den+=phi[d]*z[d];
    bool ok=den>0&&den<3e38; double c=1; if(t.combine==Combine::kLinear)a=0;
    if(t.combine==Combine::kBlend&&ok){double x=*t.alpha_logit.at(b,h,row);a=1/(1+exp(-x));c=1-a;}
    for(int d=0;d<D;++d){double ol=0; if(ok){for(int f=0;f<D;++f){float hv; if(blk.rows<D) hv=__bfloat162float(((const bf16*)t.ragged_sums)[((bh*(size_t)p.frame.queries.num_sequences+blk.sequence)*D+f)*D+d]);
        else hv=__bfloat162float(((const bf16*)o_before)[(bh*(size_t)p.frame.queries.length+blk.begin+f)*D+d]); ol+=phi[f]*hv;} ol/=den;}
      o[d]=a*o[d]+c*ol+(t.bias?t.bias[d]:0);} }
  for(int d=0;d<D;++d)out[(bh*(size_t)p.frame.queries.length+row)*D+d]=o[d];
}
Axis axis(int n,int rows,int other_n,int other_rows){Axis a;a.length=n;a.block_rows=rows;a.num_blocks=(n+rows-1)/rows;a.num_other_blocks=(other_n+other_rows-1)/other_rows;return a;}
struct Case{int B,H,Hk,N,D;int crit;Combine c;FeatureMap fm;bool table;bool mean;};
template<class T> void test(const Case&cs){
  int B=cs.B,H=cs.H,N=cs.N,D=cs.D; SparseForward p; p.dtype=(std::is_same_v<T,bf16>)?DType::kBF16:DType::kF16; p.frame.batch=B;p.frame.num_heads=H;p.frame.num_kv_heads=cs.Hk;p.frame.head_dim=D;
  p.frame.queries=axis(N,128,N,64);p.frame.keys=axis(N,64,N,128);
  std::mt19937 g(cs.N+cs.crit);
  if(cs.table){ // three sequences, some protected
    int cuts[4]={0,N/3+5,N/2+1,N}; std::vector<BlockInfo>qb,kb; 
    for(int s=0;s<3;++s){int q0=qb.size(),k0=kb.size();
      for(int r=cuts[s];r<cuts[s+1];r+=128)qb.push_back({r,std::min(128,cuts[s+1]-r),0,0,s,0,cuts[s+1]-cuts[s],0});
      for(int r=cuts[s];r<cuts[s+1];r+=64)kb.push_back({r,std::min(64,cuts[s+1]-r),q0,(int)qb.size(),s,0,cuts[s+1]-cuts[s],0});
      for(size_t n=q0;n<qb.size();++n){qb[n].other_begin=k0;qb[n].other_end=kb.size();}
      if(s==1)qb[q0].is_protected=1; if(s!=0)kb[k0].is_protected=1; }
    qb.back().is_protected=cs.crit%2;
    p.frame.queries.num_blocks=qb.size();p.frame.keys.num_blocks=kb.size();p.frame.queries.num_other_blocks=kb.size();p.frame.keys.num_other_blocks=qb.size();
    p.frame.queries.num_sequences=p.frame.keys.num_sequences=3;p.frame.queries.table=up(qb);p.frame.keys.table=up(kb);}
  int Tm=p.frame.queries.num_blocks,Tn=p.frame.keys.num_blocks,S=p.frame.queries.num_sequences;
  p.wave={0,B*cs.Hk}; size_t n=(size_t)B*H*N*D,nk=(size_t)B*cs.Hk*N*D;
  T*q=dalloc<T>(n),*k=dalloc<T>(nk),*v=dalloc<T>(nk),*o=dalloc<T>(n),*o0=dalloc<T>(n);
  fill<<<512,256>>>(q,n,1,1.f);fill<<<512,256>>>(k,nk,2,1.f);fill<<<512,256>>>(v,nk,3,1.f);fill<<<512,256>>>((bf16*)o0,n,4,3.f);
  CK(cudaMemcpy(o,o0,n*2,cudaMemcpyDeviceToDevice));
  auto rows=[&](T*x,int h){return Rows{.data=x,.stride_b=(int64_t)h*N*D,.stride_h=(int64_t)N*D,.stride_n=D,.is_vectorised=true};};
  p.q=rows(q,H);p.k=rows(k,cs.Hk);p.v=rows(v,cs.Hk);p.o=rows(o,H);
  float*lse=dalloc<float>((size_t)B*H*N);p.lse={.data=lse,.stride_b=(int64_t)H*N,.stride_h=N};p.scale=1/sqrtf(D);
  std::vector<int8_t> map((size_t)B*H*Tm*Tn); for(size_t r=0;r<map.size();r+=Tn){int c=(r/Tn)%5==4?0:cs.crit+((r/Tn)%3==0); for(int j=0;j<c;++j)map[r+g()%Tn]=1;}
  p.map.data=up(map);p.map.stride_b=(int64_t)H*Tm*Tn;p.map.stride_h=(int64_t)Tm*Tn;p.map.stride_i=Tn;p.map.stride_j=1;
  p.is_protected_only=cs.c==Combine::kLinear;
  bf16*rag=dalloc<bf16>((size_t)B*H*S*D*D);fill<<<64,256>>>(rag,(size_t)B*H*S*D*D,5,3.f);
  std::vector<float> z((size_t)B*H*Tm*D);for(size_t e=0;e<z.size();++e){z[e]=1+(g()%1000)/500.f; if(e/D%7==3)z[e]=NAN; if(e/D%7==5)z[e]=0;}
  std::vector<float> al((size_t)B*H*N);for(auto&x:al)x=(g()%1000)/100.f-5; std::vector<float> bi(D);for(auto&x:bi)x=(g()%1000)/500.f-1;
  p.linear={.is_on=cs.c!=Combine::kSparse,.ragged_sums=(bf16_t*)rag,.sums_z=up(z),.combine=cs.c,.feature_map=cs.fm,.epsilon=0,.bias=cs.c==Combine::kProjection?up(bi):nullptr,.alpha_logit={.data=up(al),.stride_b=(int64_t)H*N,.stride_h=N}};
  if(!combines_sm90(p)){printf("combines false\n");}
  bool ok=sparse_forward_sm90(p,nullptr); auto e=cudaDeviceSynchronize(); if(!ok||e!=cudaSuccess){printf("FAILED launch %d %s\n",ok,cudaGetErrorString(e));exit(1);}
  float*ro=dalloc<float>(n),*rl=dalloc<float>((size_t)B*H*N);
  ref<T><<<B*H*N,32>>>(p,o0,ro,rl,cs.fm==FeatureMap::kSoftmax?0:cs.fm==FeatureMap::kElu1?1:2);CK(cudaDeviceSynchronize());
  std::vector<T> ho(n);std::vector<float> hr(n),hl((size_t)B*H*N),hrl((size_t)B*H*N);
  CK(cudaMemcpy(ho.data(),o,n*2,cudaMemcpyDeviceToHost));CK(cudaMemcpy(hr.data(),ro,n*4,cudaMemcpyDeviceToHost));CK(cudaMemcpy(hl.data(),lse,hl.size()*4,cudaMemcpyDeviceToHost));CK(cudaMemcpy(hrl.data(),rl,hl.size()*4,cudaMemcpyDeviceToHost));
  double num=0,den=0,mx=0,lm=0;size_t bad=0;for(size_t x=0;x<n;++x){float a=(std::is_same_v<T,bf16>)?__bfloat162float(*(bf16*)&ho[x]):__half2float(*(fp16*)&ho[x]);double d=a-hr[x];if(!(fabs(d)<1e30))++bad;else{num+=d*d;den+=(double)hr[x]*hr[x];mx=std::max(mx,fabs(d));}}
  for(size_t x=0;x<hl.size();++x){ if(std::isinf(hl[x])||std::isinf(hrl[x])){if(hl[x]!=hrl[x])++bad;}else lm=std::max(lm,(double)fabs(hl[x]-hrl[x]));}
  // deterministic
  std::vector<T> h2(n);CK(cudaMemcpy(o,o0,n*2,cudaMemcpyDeviceToDevice));sparse_forward_sm90(p,nullptr);CK(cudaDeviceSynchronize());CK(cudaMemcpy(h2.data(),o,n*2,cudaMemcpyDeviceToHost));
  bool same=!memcmp(h2.data(),ho.data(),n*2);
  printf("%s B%d H%d/%d N%d D%d crit%d comb%d fm%d table%d: rel %.2e max %.2e lse %.1e bad %zu %s\n",(std::is_same_v<T,bf16>)?"bf16":"fp16",B,H,cs.Hk,N,D,cs.crit,(int)cs.c,(int)cs.fm,cs.table,sqrt(num/den),mx,lm,bad,same?"":"NOT DETERMINISTIC");fflush(stdout);
  for(void*x:{(void*)q,(void*)k,(void*)v,(void*)o,(void*)o0,(void*)ro})cudaFree(x);
}
void timing(int H,int N,int D,int crit){
  SparseForward p;p.frame.batch=1;p.frame.num_heads=p.frame.num_kv_heads=H;p.frame.head_dim=D;p.frame.queries=axis(N,128,N,64);p.frame.keys=axis(N,64,N,128);
  int Tm=p.frame.queries.num_blocks,Tn=p.frame.keys.num_blocks;p.wave={0,H};size_t n=(size_t)H*N*D;p.scale=1/sqrtf(D);
  std::mt19937 g(7);std::vector<int8_t> map((size_t)H*Tm*Tn);for(size_t r=0;r<map.size();r+=Tn){int left=crit;while(left>0){auto&x=map[r+g()%Tn];if(!x){x=1;--left;}}}
  int8_t*dm=up(map);bf16*x[3][4];for(int s=0;s<3;++s)for(int t=0;t<4;++t){x[s][t]=dalloc<bf16>(n);fill<<<512,256>>>(x[s][t],n,s*4+t,1.f);}
  float*lse=dalloc<float>((size_t)H*N);bf16*rag=dalloc<bf16>((size_t)H*D*D);fill<<<64,256>>>(rag,(size_t)H*D*D,5,1.f);
  std::vector<float> z((size_t)H*Tm*D,1.f),al((size_t)H*N,1.f),bi(D,.1f);float*dz=up(z),*da=up(al),*db=up(bi);
  cudaEvent_t e0,e1;cudaEventCreate(&e0);cudaEventCreate(&e1);
  for(int rep=0;rep<2;++rep)for(int mode=0;mode<4;++mode){std::vector<float> ts;
    for(int it=0;it<33;++it){int s=it%3;auto R=[&](bf16*y){return Rows{.data=y,.stride_b=(int64_t)H*N*D,.stride_h=(int64_t)N*D,.stride_n=D,.is_vectorised=true};};
      p.q=R(x[s][0]);p.k=R(x[s][1]);p.v=R(x[s][2]);p.o=R(x[s][3]);p.lse={.data=lse,.stride_b=(int64_t)H*N,.stride_h=N};
      p.map.data=dm;p.map.stride_b=(int64_t)H*Tm*Tn;p.map.stride_h=(int64_t)Tm*Tn;p.map.stride_i=Tn;p.map.stride_j=1;
      p.linear={.is_on=mode>0,.ragged_sums=(bf16_t*)rag,.sums_z=dz,.combine=mode==3?Combine::kBlend:mode==2?Combine::kProjection:Combine::kSum,.bias=mode==2?db:nullptr,.alpha_logit={.data=da,.stride_b=(int64_t)H*N,.stride_h=N}};
      cudaEventRecord(e0);if(!sparse_forward_sm90(p,nullptr)){printf("no\n");return;}cudaEventRecord(e1);CK(cudaEventSynchronize(e1));float ms;cudaEventElapsedTime(&ms,e0,e1);if(it>=3)ts.push_back(ms);}
    std::sort(ts.begin(),ts.end());printf("time H%d N%d D%d crit%d %s: %.4f ms (min %.4f)\n",H,N,D,crit,mode==0?"plain":mode==1?"sum":mode==2?"proj":"blend",ts[ts.size()/2],ts[0]);fflush(stdout);}
  for(int s=0;s<3;++s)for(int t=0;t<4;++t)cudaFree(x[s][t]);
}
int main(int argc,char**argv){
  bool small=argc>1&&argv[1][0]=='s';
  using C=Combine;using F=FeatureMap;
  if(small){test<bf16>({1,1,1,700,128,3,C::kBlend,F::kSoftmax,true,false});test<bf16>({1,1,1,700,64,3,C::kProjection,F::kElu1,true,false});return 0;}
  for(int D:{128,64})for(int table=0;table<2;++table){
    test<bf16>({1,2,2,1500,D,4,C::kSparse,F::kSoftmax,(bool)table,false});
    for(C c:{C::kSum,C::kProjection,C::kBlend,C::kLinear})for(F f:{F::kSoftmax,F::kElu1,F::kRelu}){test<bf16>({2,4,2,1300+(int)c*50,D,3+(int)f,c,f,(bool)table,false});
      test<fp16>({2,4,2,1500+(int)c*37,D,5+(int)f,c,f,(bool)table,false});}}
  timing(12,32760,128,15);timing(12,32760,128,25);timing(48,17776,64,14);
}
