# What nvcc is told of architectures. A list is written as for torch's own extensions: "9.0",
# "8.6;9.0+PTX", "10.0f" for a family, "9.0a" for one architecture alone. As flags, since what CMake
# takes in CMAKE_CUDA_ARCHITECTURES grows with its versions.

# Those of the package, where nobody names others: machine code for each kind of GPU, and PTX for what
# comes. That of 8.0 is for every one that has no machine code, such as 11.0 where nvcc is older than 13.
function(hqod_default_architectures nvcc_version result)
  set(list "7.5;8.0+PTX;8.6;8.9;9.0;10.0;12.0+PTX")
  if(nvcc_version VERSION_GREATER_EQUAL 13)
    set(list "7.5;8.0+PTX;8.6;8.9;9.0;10.0;11.0;12.0+PTX")
  endif()
  set(${result} "${list}" PARENT_SCOPE)
endfunction()

function(hqod_architecture_flags list result)
  string(REGEX REPLACE "[ ,;]+" ";" list "${list}")
  set(flags "")
  foreach(arch IN LISTS list)
    if(NOT arch MATCHES "^([0-9]+)\\.([0-9][af]?)(\\+PTX)?$")
      message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST: expected entries such as 9.0 or 9.0+PTX, got ${arch}")
    endif()
    set(number "${CMAKE_MATCH_1}${CMAKE_MATCH_2}")
    list(APPEND flags "--generate-code=arch=compute_${number},code=sm_${number}")
    if(CMAKE_MATCH_3)
      list(APPEND flags "--generate-code=arch=compute_${number},code=compute_${number}")
    endif()
  endforeach()
  set(${result} "${flags}" PARENT_SCOPE)
endfunction()
