# The CUDA library. Its architectures are those of TORCH_CUDA_ARCH_LIST, as for torch's own
# extensions: "9.0", "8.6;9.0+PTX", "10.0f".
set(arch_list "$ENV{TORCH_CUDA_ARCH_LIST}")
if(arch_list STREQUAL "")
  # PTX of 8.0 too, for what has none of these: 11.0 where nvcc is older than 13.
  set(arch_list "7.5;8.0+PTX;8.6;8.9;9.0;10.0;12.0+PTX")
  find_program(nvcc nvcc HINTS "$ENV{CUDA_HOME}/bin")
  execute_process(COMMAND "${nvcc}" --version OUTPUT_VARIABLE version)
  if(version MATCHES "release ([0-9.]+)" AND CMAKE_MATCH_1 VERSION_GREATER_EQUAL 13)
    string(REPLACE "12.0" "11.0;12.0" arch_list "${arch_list}")
  endif()
endif()
string(REGEX REPLACE "[ ,;]+" ";" arch_list "${arch_list}")
set(CMAKE_CUDA_ARCHITECTURES "")
foreach(arch IN LISTS arch_list)
  if(NOT arch MATCHES "^([0-9]+)\\.([0-9][af]?)(\\+PTX)?$")
    message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST: expected entries such as 9.0 or 9.0+PTX, got ${arch}")
  endif()
  list(APPEND CMAKE_CUDA_ARCHITECTURES "${CMAKE_MATCH_1}${CMAKE_MATCH_2}-real")
  if(CMAKE_MATCH_3)
    list(APPEND CMAKE_CUDA_ARCHITECTURES "${CMAKE_MATCH_1}${CMAKE_MATCH_2}-virtual")
  endif()
endforeach()

set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
enable_language(CUDA)

add_library(hqod_cuda_kernels OBJECT ${cuda_kernels})
set_target_properties(hqod_cuda_kernels PROPERTIES CUDA_STANDARD 20 CUDA_STANDARD_REQUIRED ON)
target_include_directories(hqod_cuda_kernels PRIVATE csrc)
target_compile_definitions(hqod_cuda_kernels PRIVATE HQOD_ISA=cuda)
# No fused products but those asked for: see mul_add in csrc/math/elementary.h.
target_compile_options(hqod_cuda_kernels PRIVATE -O3 -fmad=false -Xptxas=-v --threads=2
                                                 -Xcompiler=-fvisibility=hidden)
if(HQOD_WERROR)
  target_compile_options(hqod_cuda_kernels PRIVATE --Werror=all-warnings -Xcompiler=-Wall,-Wextra)
endif()

add_ops_library(hqod_ops_cuda CUDA csrc/device/cuda.cpp csrc/device/cuda_stream.cpp)
target_sources(hqod_ops_cuda PRIVATE $<TARGET_OBJECTS:hqod_cuda_kernels>)
target_link_libraries(hqod_ops_cuda PRIVATE ${CMAKE_DL_LIBS})
