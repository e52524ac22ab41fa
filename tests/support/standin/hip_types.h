// The parts of HIP's and hiprtc's C interface that the stand-in exports (ROCm 7, R0600 layout).
#pragma once
#include <cstddef>

using hipError_t = int;
constexpr hipError_t hipSuccess = 0, hipErrorInvalidValue = 1, hipErrorOutOfMemory = 2,
                     hipErrorInvalidImage = 200, hipErrorNotFound = 500, hipErrorNotReady = 600,
                     hipErrorLaunchFailure = 719, hipErrorInvalidDevice = 101;

// hipDeviceProp_tR0600: only what somebody reads, by offset.
constexpr size_t kPropBytes = 1472, kPropName = 0, kPropMemory = 288, kPropShared = 296,
                 kPropWave = 308, kPropThreads = 320, kPropCores = 388, kPropSharedOptIn = 696,
                 kPropArch = 1160;

using hiprtcResult = int;
constexpr hiprtcResult HIPRTC_SUCCESS = 0, HIPRTC_ERROR_COMPILATION = 6;
