#include <cstdio>
#include <cstdlib>
#include <vector>
#include <cmath>
#include <cstring>
#include <algorithm>
#include "cuda/sm90/linear_sums.cuh"
#include "cuda/sm90/tensor_map.h"
#include "cuda/common/launch.cuh"
using namespace sparline; using namespace sparline::cuda;
#define CK(x) do { auto err_=(x); if(err_!=cudaSuccess){printf("%s: %s\n",#x,cudaGetErrorString(err_)); exit(1);} } while(0)
#ifndef TT
#define TT bf16
#endif
__global__ void fill(TT* x, long n, unsigned seed, float s){ for(long i=blockIdx.x*256L+threadIdx.x;i<n;i+=gridDim.x*256L){ unsigned h=(unsigned)i*2654435761u^seed; h^=h>>16;h*=0x85ebca6b;h^=h>>13;h*=0xc2b2ae35;h^=h>>16; unsigned g=h*747796405u+2891336453u; g^=g>>15; g*=0x2c1b3c6d; g^=g>>12; float u=(h+1.0f)/4294967808.0f,v=g/4294967296.0f; x[i]=from_float<TT>(s*sqrtf(-2*logf(u))*cosf(6.2831853f*v)); } }
__global__ void phi_naive(const TT* k, float* phi, long rows, int D){ long r=blockIdx.x; int f=threadIdx.x; __shared__ float s[128]; float x=to_float(k[r*D+f]); s[f]=x; __syncthreads(); float m=-1e30f; for(int i=0;i<D;++i) m=fmaxf(m,s[i]); float sum=0; for(int i=0;i<D;++i) sum+=expf(s[i]-m); phi[r*D+f]=to_float(from_float<bf16>(expf(x-m)/sum)); }
__global__ void vproj_naive(const TT* v, const float* w, float* y, int D, int proj){ long r=blockIdx.x; int o=threadIdx.x; if(!proj){y[r*D+o]=to_float(v[r*D+o]);return;} float s=0; for(int d=0;d<D;++d) s+=to_float(v[r*D+d])*to_float(from_float<TT>(w[o*D+d])); y[r*D+o]=to_float(from_float<bf16>(s)); }
__global__ void h_naive(const float* phi, const float* v, float* h, float* z, int N, int Tn, int D){ int j=blockIdx.x%Tn; int p=blockIdx.x/Tn; int rows=min(64,N-j*64); const float* P=phi+((long)p*N+j*64)*D; const float* V=v+((long)p*N+j*64)*D; int d=threadIdx.x; for(int f=0;f<D;++f){ float s=0; for(int c=0;c<rows;++c) s+=P[c*D+f]*V[c*D+d]; h[(long)blockIdx.x*D*D+f*D+d]=to_float(from_float<bf16>(s)); } float s=0; for(int c=0;c<rows;++c) s+=P[c*D+d]; z[(long)blockIdx.x*D+d]=to_float(from_float<bf16>(s)); }
// one block per (head,i,f)
__global__ void check(const int8_t* map, const float* h, const float* z, const bf16* o, const bf16* ragged, const float* sz, int N, int Tm, int Tn, int D, int bq, float* err){ int f=blockIdx.x%D; int i=blockIdx.x/D%Tm; int p=blockIdx.x/D/Tm; int d=threadIdx.x; const int8_t* m=map+((long)p*Tm+i)*Tn; float s=0,zz=0; bool any=false; for(int j=0;j<Tn;++j) if(m[j]==0){ any=true; s+=h[((long)p*Tn+j)*D*D+f*D+d]; if(d==0) zz+=z[((long)p*Tn+j)*D+f]; }
 int rows=min(bq,N-i*bq); float got = rows>=D? to_float(o[((long)p*N+i*bq+f)*D+d]) : to_float(ragged[((long)p*D+f)*D+d]); float e=fabsf(got-s); if(!(e<1e30f)) e=1e30f; atomicMax((int*)err,__float_as_int(e)); atomicMax((int*)err+1,__float_as_int(fabsf(s))); if(d==0){ float g=sz[((long)p*Tm+i)*D+f]; if(!any){ if(!isnan(g)) atomicMax((int*)err+2,__float_as_int(9e9f)); } else { float q=fabsf(g-zz)/fmaxf(zz,1e-6f); if(!(q<1e30f)) q=1e30f; atomicMax((int*)err+2,__float_as_int(q)); } } }
template <int D> int run(int N,int H,int bq,bool proj,int slots,float frac,bool docheck,int reps,int mode=0){
 using Tr=LinearSumsTraits<TT,D>; int Tm=(N+bq-1)/bq, Tn=(N+63)/64; long e=(long)H*N*D;
 TT *k,*v; bf16*o; CK(cudaMalloc(&k,e*2));CK(cudaMalloc(&v,e*2));CK(cudaMalloc(&o,e*2)); fill<<<1024,256>>>(k,e,1,1);fill<<<1024,256>>>(v,e,2,1); CK(cudaMemset(o,0,e*2));
 std::vector<int8_t> m((size_t)H*Tm*Tn); for(size_t r=0;r<(size_t)H*Tm;++r){ for(int j=0;j<Tn;++j) m[r*Tn+j]=0; int n=std::max(1,(int)(frac*Tn)); for(int c=0;c<n;++c) m[r*Tn+rand()%Tn]=1; if(r%7==3) for(int c=0;c<Tn/8;++c) m[r*Tn+rand()%Tn]=-1; if(r==5) for(int j=0;j<Tn;++j) m[r*Tn+j]=1; }
 int8_t* map; CK(cudaMalloc(&map,m.size())); CK(cudaMemcpy(map,m.data(),m.size(),cudaMemcpyHostToDevice));
 float* w; CK(cudaMalloc(&w,D*D*4)); std::vector<float> hw(D*D); for(auto&x:hw) x=(rand()%2001-1000)/1000.0f*0.15f; CK(cudaMemcpy(w,hw.data(),D*D*4,cudaMemcpyHostToDevice));
 LinearSumsParams P; LinearParams& L=P.linear; L.frame={.queries={.length=N,.block_rows=bq,.num_blocks=Tm,.num_other_blocks=Tn,.num_sequences=1},.keys={.length=N,.block_rows=64,.num_blocks=Tn,.num_other_blocks=Tm,.num_sequences=1},.batch=1,.num_heads=H,.num_kv_heads=H,.head_dim=D};
 L.wave={0,H}; L.combine=proj?Combine::kProjection:Combine::kSum; L.feature_map=FeatureMap::kSoftmax; L.scope=LinearScope::kMarginal; L.map={.data=map,.stride_b=(int64_t)H*Tm*Tn,.stride_h=(int64_t)Tm*Tn,.stride_i=Tn,.stride_j=1}; L.proj_weight=w;
 Rows rk{.data=k,.stride_b=(int64_t)H*N*D,.stride_h=(int64_t)N*D,.stride_n=D,.is_vectorised=true}; Rows rv=rk; rv.data=v; P.o=rk; P.o.data=o; L.k=rk; L.v=rv;
 P.slots=slots; P.tiles_m=(Tm+Tr::kTileM-1)/Tr::kTileM; P.tiles_n=D*D/Tr::kTileN+1; P.chunks=(Tn+63)/64; P.num_units=mode==2?0:H*Tn; P.num_tiles=mode==1?0:H*P.tiles_m*P.tiles_n;
 CK(cudaMalloc(&P.state_data,(size_t)slots*Tn*D*D*2)); CK(cudaMalloc(&P.z_data,(size_t)slots*Tn*D*2)); CK(cudaMalloc(&P.bits,(size_t)H*P.tiles_m*P.chunks*Tr::kTileM*8)); CK(cudaMalloc(&P.empty_rows,(size_t)H*P.tiles_m*Tr::kTileM*4)); CK(cudaMalloc(&P.ragged,(size_t)H*D*D*2)); CK(cudaMalloc(&P.sums_z,(size_t)H*Tm*D*4));
 size_t nc=(size_t)H*(2+P.chunks); uint32_t* c; CK(cudaMalloc(&c,nc*4)); P.bits_ready=c; P.pair_done=c+H; P.chunk_ready=c+2*H;
 Rows rs{.data=P.state_data,.stride_h=(int64_t)Tn*D*D,.stride_n=D*D,.is_vectorised=true}; Rows rz{.data=P.z_data,.stride_h=(int64_t)Tn*D,.stride_n=D,.is_vectorised=true};
 DType dt=(std::is_same_v<TT,bf16>) ? DType::kBF16:DType::kF16;
 if(!encode_rows(P.k,rk,dt,1,H,N,D,64)||!encode_rows(P.v,rv,dt,1,H,N,D,64)||!encode_rows(P.states,rs,DType::kBF16,1,slots,Tn,D*D,64)||!encode_rows(P.z,rz,DType::kBF16,1,slots,Tn,D,64)){printf("encode\n");exit(1);}
 int sms; CK(cudaDeviceGetAttribute(&sms,cudaDevAttrMultiProcessorCount,0));
 cudaEvent_t a,b; cudaEventCreate(&a);cudaEventCreate(&b); std::vector<float> ts; char* flush; CK(cudaMalloc(&flush,256<<20));
 for(int r=0;r<reps;++r){ CK(cudaMemset(flush,0,256<<20)); cudaEventRecord(a); CK(cudaMemsetAsync(c,mode?0x7f:0,nc*4)); launch((linear_sums_sm90_kernel<Tr>),LaunchShape{.blocks=sms,.threads=Tr::kThreads,.shared_bytes=(int64_t)sizeof(LinearSumsShared<Tr>),.is_cooperative=true},nullptr,P); cudaEventRecord(b); CK(cudaEventSynchronize(b)); float t; cudaEventElapsedTime(&t,a,b); ts.push_back(t*1e3f);} CK(cudaGetLastError());
 #ifdef PROF
 { unsigned long long z[64]; cudaMemcpyFromSymbol(z,prof_sums,sizeof(z)); double n=132.0*reps; printf("prof kclk/SM:"); for(int i=0;i<56;++i){ if(i%16==0) printf("\n  [%d]",i); printf(" %.1f",z[i]/n/1000);} printf("\n"); memset(z,0,sizeof z); cudaMemcpyToSymbol(prof_sums,z,sizeof(z)); }
#endif
 std::sort(ts.begin(),ts.end()); printf("mode %d D %d N %d H %d proj %d slots %d: median %.1f us min %.1f",mode,D,N,H,proj,slots,ts[ts.size()/2],ts[0]);
 if(docheck){ float *phi,*vp,*h,*z,*err; CK(cudaMalloc(&phi,e*4));CK(cudaMalloc(&vp,e*4));CK(cudaMalloc(&h,(size_t)H*Tn*D*D*4));CK(cudaMalloc(&z,(size_t)H*Tn*D*4));CK(cudaMalloc(&err,16));CK(cudaMemset(err,0,16)); phi_naive<<<(long)H*N,D>>>(k,phi,(long)H*N,D); vproj_naive<<<(long)H*N,D>>>(v,w,vp,D,proj); h_naive<<<H*Tn,D>>>(phi,vp,h,z,N,Tn,D); check<<<H*Tm*D,D>>>(map,h,z,o,P.ragged,P.sums_z,N,Tm,Tn,D,bq,err); CK(cudaDeviceSynchronize()); float he[3]; cudaMemcpy(he,err,12,cudaMemcpyDeviceToHost); printf("  max err %.4g of %.4g, z rel %.3g %s",he[0],he[1],he[2],he[0]<=he[1]*0.006f&&he[2]<1e-3f?"ok":"BAD"); cudaFree(phi);cudaFree(vp);cudaFree(h);cudaFree(z);cudaFree(err);} printf("\n"); fflush(stdout);
 cudaFree(k);cudaFree(v);cudaFree(o);cudaFree(map);cudaFree(w);cudaFree(P.state_data);cudaFree(P.z_data);cudaFree(P.bits);cudaFree(P.ragged);cudaFree(P.sums_z);cudaFree(c);cudaFree(P.empty_rows);cudaFree(flush); return 0; }
int main(int argc,char**argv){ 
 run<128>(1000,2,128,false,2,0.1f,true,2); run<128>(5000,3,128,true,1,0.1f,true,2); run<64>(5000,3,128,true,2,0.1f,true,2);
 for(int m=0;m<=3;++m) run<128>(32760,12,128,false,2,0.03f,m==0,15,m);
 for(int m=0;m<=1;++m) run<128>(32760,12,128,true,2,0.03f,m==0,15,m);
 run<128>(32760,12,128,true,3,0.03f,false,15); run<64>(17776,48,128,true,8,0.03f,true,10); run<128>(75600,40,128,true,2,0.03f,false,6);
 return 0; }
