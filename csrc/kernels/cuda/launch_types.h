// What host code needs to know of a launch.
#pragma once

namespace hqod {

using Stream = void*;  // a cudaStream_t

}  // namespace hqod
