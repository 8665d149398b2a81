set -e
cd $ROOT; F="-std=c++20 -O3 -Iinclude -Isrc --expt-relaxed-constexpr -gencode=arch=compute_90a,code=sm_90a"
for u in "$@"; do nvcc $F -Xptxas=-v -c src/cuda/sm90/$u.cu -o $BUILD/$u.o 2>&1 | grep -i "C75\|spill\|error" || true; done
nvcc $F -c $BUILD/h.cu -o $BUILD/h.o
[ -f $BUILD/launch.o ] || nvcc $F -c src/cuda/common/launch.cu -o $BUILD/launch.o
nvcc $F -cudart static -o $BUILD/h $BUILD/*.o
mkdir -p $OUT; cp $BUILD/h $OUT/h
