# The CUDA library, for the architectures of TORCH_CUDA_ARCH_LIST.
include(${CMAKE_CURRENT_LIST_DIR}/architectures.cmake)

set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
set(CMAKE_CUDA_ARCHITECTURES OFF)  # they are among the flags
enable_language(CUDA)
set(arch_list "$ENV{TORCH_CUDA_ARCH_LIST}")
if(arch_list STREQUAL "")
  hqod_default_architectures("${CMAKE_CUDA_COMPILER_VERSION}" arch_list)
endif()
hqod_architecture_flags("${arch_list}" arch_flags)

add_library(hqod_cuda_kernels OBJECT ${cuda_kernels})
set_target_properties(hqod_cuda_kernels PROPERTIES CUDA_STANDARD 20 CUDA_STANDARD_REQUIRED ON)
target_include_directories(hqod_cuda_kernels PRIVATE csrc)
target_compile_definitions(hqod_cuda_kernels PRIVATE HQOD_ISA=cuda)
# No fused products but those asked for: see mul_add in csrc/math/elementary.h.
target_compile_options(hqod_cuda_kernels PRIVATE -O3 -fmad=false -Xptxas=-v --threads=2
                                                 ${arch_flags}
                                                 -Xcompiler=-fvisibility=hidden)
if(HQOD_WERROR)
  target_compile_options(hqod_cuda_kernels PRIVATE --Werror=all-warnings -Xcompiler=-Wall,-Wextra)
endif()

add_ops_library(hqod_ops_cuda CUDA csrc/device/cuda.cpp csrc/device/cuda_stream.cpp)
target_sources(hqod_ops_cuda PRIVATE $<TARGET_OBJECTS:hqod_cuda_kernels>)
target_link_libraries(hqod_ops_cuda PRIVATE ${CMAKE_DL_LIBS})
