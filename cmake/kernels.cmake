# SPDX-License-Identifier: Apache-2.0
# Adds the kernels and their FFI handlers to the module _C.

set(CMAKE_CUDA_COMPILER ${EQX_FLASH_NVCC})
set(CMAKE_CUDA_ARCHITECTURES 90a-real) # -gencode=arch=compute_90a,code=sm_90a: SASS only, no PTX
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
enable_language(CUDA)
string(REGEX MATCH "^[0-9]+[.][0-9]+" cuda_version ${CMAKE_CUDA_COMPILER_VERSION})
list(JOIN EQX_FLASH_HEAD_DIMS "," head_dims)
message(STATUS "CUDA: ${CMAKE_CUDA_COMPILER} (${CMAKE_CUDA_COMPILER_VERSION}), head dims ${head_dims}")

# One kernel a translation unit: every core is busy, and ccache hits what did not change.
set(generated ${PROJECT_BINARY_DIR}/generated)
set(kernels)
set(elements __nv_bfloat16 __half)
set(element_names bf16 f16)
set(passes forward backward)
set(params ForwardParams BackwardParams)
foreach(PASS PARAMS IN ZIP_LISTS passes params)
  foreach(ELEMENT element_name IN ZIP_LISTS elements element_names)
    foreach(HEAD_DIM IN LISTS EQX_FLASH_HEAD_DIMS)
      foreach(MASK IN ITEMS Full Causal)
        string(TOLOWER ${MASK} mask_name)
        set(kernel ${generated}/${PASS}_${element_name}_${HEAD_DIM}_${mask_name}.cu)
        configure_file(csrc/instantiate.cu.in ${kernel} @ONLY)
        list(APPEND kernels ${kernel})
      endforeach()
    endforeach()
  endforeach()
endforeach()

set(wgmma_atoms ${generated}/wgmma_atoms.inc)
set(generate_wgmma ${PROJECT_SOURCE_DIR}/csrc/sm90/generate_wgmma.py)
add_custom_command(OUTPUT ${wgmma_atoms} DEPENDS ${generate_wgmma} VERBATIM
                   COMMAND ${Python_EXECUTABLE} ${generate_wgmma} ${wgmma_atoms})

# Every kernel is compiled through check_ptxas.py, which fails the build on a spill or a serialised
# wgmma.
add_library(eqx_flash_kernels OBJECT ${kernels} ${wgmma_atoms})
target_include_directories(eqx_flash_kernels PRIVATE csrc ${generated})
target_compile_options(eqx_flash_kernels PRIVATE -Xptxas=-v
                       --expt-relaxed-constexpr) # tile sizes are plain constexpr functions
set(launcher ${Python_EXECUTABLE} ${PROJECT_SOURCE_DIR}/cmake/check_ptxas.py)
if(CCACHE)
  list(APPEND launcher ${CCACHE})
endif()
set_target_properties(eqx_flash_kernels PROPERTIES CUDA_COMPILER_LAUNCHER "${launcher}")

target_sources(_C PRIVATE csrc/ffi/handlers.cpp)
target_include_directories(_C SYSTEM PRIVATE ${EQX_FLASH_FFI_INCLUDE}
                           ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
target_compile_definitions(_C PRIVATE
  EQX_FLASH_WITH_CUDA=1
  EQX_FLASH_HEAD_DIMS_LIST="${head_dims}"
  EQX_FLASH_CUDA_VERSION="${cuda_version}")
foreach(HEAD_DIM IN LISTS EQX_FLASH_HEAD_DIMS)
  target_compile_definitions(_C PRIVATE EQX_FLASH_HAVE_${HEAD_DIM}=1)
endforeach()
# The static runtime, kept to ourselves: JAX brings its own, and a machine without a driver must
# still be able to import the module.
set_target_properties(_C PROPERTIES CUDA_ARCHITECTURES ${CMAKE_CUDA_ARCHITECTURES}
                                    CUDA_RUNTIME_LIBRARY Static)
target_link_libraries(_C PRIVATE eqx_flash_kernels)
target_link_options(_C PRIVATE LINKER:--exclude-libs,ALL)
