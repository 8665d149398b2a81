set -e; cd $BUILD
for u in sparse_fwd_64 sparse_fwd_128 sparse_fwd_linear_64 sparse_fwd_linear_128; do echo "#include \"cuda/sm90/$u.cu\""; done > all.cpp
g++ -std=c++20 -O2 -g1 -fno-strict-aliasing -w -DSPARLINE_EMULATE_CUDA -I$BUILD -I$ROOT/include -I$ROOT/src -I$ROOT/tests/cuda -I/usr/local/cuda/include -c all.cpp -o all.o & 
g++ -std=c++20 -O2 -g1 -fno-strict-aliasing -w -DSPARLINE_EMULATE_CUDA -I$BUILD -I$ROOT/include -I$ROOT/src -I$ROOT/tests/cuda -I/usr/local/cuda/include -c he.cpp -o he.o; wait
[ -f em.o ] || g++ -std=c++20 -O2 -g1 -fno-strict-aliasing -w -DSPARLINE_EMULATE_CUDA -I$BUILD -I$ROOT/include -I$ROOT/src -I$ROOT/tests/cuda -I/usr/local/cuda/include -c $ROOT/tests/cuda/emulator/emulator.cpp -o em.o
g++ -std=c++20 -O2 -g1 -fno-strict-aliasing -w -DSPARLINE_EMULATE_CUDA -I$BUILD -I$ROOT/include -I$ROOT/src -I$ROOT/tests/cuda -I/usr/local/cuda/include -c cuda/sm90/tensor_map_emu.cpp -o tm.o; g++ *.o -o he -ldl -rdynamic
