// What a library of the kernels shows to the modules that use it, in a wheel for several torches. No torch.
#pragma once

// In this spelling, which nvcc takes too.
#define FUSEDOPT_EXPORT __attribute__((visibility("default")))
