// Device attributes by their number in CUDA's headers: an H100's.
#pragma once

static const int ATTRIBUTES[][2] = {
    {1, 1024}, // threads of a block
    {8, 49152}, // shared memory of a block
    {10, 32}, // warp
    {12, 65536}, // registers of a block
    {13, 1980000}, // clock, kHz
    {16, 132}, // multiprocessors
    {36, 2619000}, // memory clock, kHz
    {37, 5120}, // memory bus, bits
    {38, 50 << 20}, // L2
    {39, 2048}, // threads of a multiprocessor
    {75, 9}, // compute capability, major
    {76, 0}, // minor
    {81, 233472}, // shared memory of a multiprocessor
    {82, 65536}, // registers of a multiprocessor
    {97, 232448}, // shared memory of a block, opt-in
    {106, 32}, // blocks of a multiprocessor
};

// Value of an attribute, 1 for those that are not listed.
static int attribute(int number) {
  for (unsigned i = 0; i < sizeof ATTRIBUTES / sizeof *ATTRIBUTES; i++)
    if (ATTRIBUTES[i][0] == number)
      return ATTRIBUTES[i][1];
  return 1;
}
