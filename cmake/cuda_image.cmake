# The CUDA kernels, compiled by nvcc and put into a library (cuda/image.cpp). Without nvcc there is
# nothing to put in; the kernels are then compiled at first use (sparse_kernels/cuda_code.py).

# Sets `nvcc` to a compiler that works, of CUDA 12 or newer, and `nvcc_version` to "13.0", or
# `no_nvcc` to what is missing.
function(find_nvcc)
  set(nvcc "" PARENT_SCOPE)
  find_program(SPARSE_KERNELS_NVCC nvcc HINTS ENV CUDACXX ENV CUDA_HOME ENV CUDA_PATH
               PATHS /usr/local/cuda PATH_SUFFIXES bin)
  if(EXISTS "$ENV{CUDACXX}")
    set(SPARSE_KERNELS_NVCC $ENV{CUDACXX})
  endif()
  if(NOT SPARSE_KERNELS_NVCC)
    set(no_nvcc "nvcc is neither on the PATH nor in CUDACXX" PARENT_SCOPE)
    return()
  endif()
  execute_process(COMMAND ${SPARSE_KERNELS_NVCC} --version OUTPUT_VARIABLE text ERROR_QUIET)
  if(NOT text MATCHES "release ([0-9]+\\.[0-9]+)")
    set(no_nvcc "${SPARSE_KERNELS_NVCC} does not tell its version" PARENT_SCOPE)
    return()
  endif()
  set(version ${CMAKE_MATCH_1})
  if(version VERSION_LESS 12.0)
    set(no_nvcc "${SPARSE_KERNELS_NVCC} is of CUDA ${version}; 12.0 is needed" PARENT_SCOPE)
    return()
  endif()
  # A toolkit that does not know the host's compiler stops at its first header.
  set(probe ${CMAKE_CURRENT_BINARY_DIR}/nvcc_probe.cu)
  file(WRITE ${probe} "#include <stdint.h>\n__global__ void probe(uint32_t* out) { *out = 1; }\n")
  execute_process(
    COMMAND ${SPARSE_KERNELS_NVCC} -ccbin ${CMAKE_CXX_COMPILER} -std=c++17 -arch=sm_80 -fatbin
            ${probe} -o ${probe}.fatbin
    RESULT_VARIABLE failed OUTPUT_VARIABLE text ERROR_VARIABLE text)
  if(failed)
    set(no_nvcc "${SPARSE_KERNELS_NVCC} does not work with ${CMAKE_CXX_COMPILER}:\n${text}"
        PARENT_SCOPE)
    return()
  endif()
  set(nvcc ${SPARSE_KERNELS_NVCC} PARENT_SCOPE)
  set(nvcc_version ${version} PARENT_SCOPE)
endfunction()

function(embed_cuda_image target folder)
  if(NOT SPARSE_KERNELS_CUDA MATCHES "^(ON|OFF|AUTO)$")
    message(FATAL_ERROR "SPARSE_KERNELS_CUDA is ${SPARSE_KERNELS_CUDA}; it can be ON, OFF or AUTO")
  endif()
  if(SPARSE_KERNELS_CUDA STREQUAL OFF)
    message(STATUS "CUDA kernels: not compiled, SPARSE_KERNELS_CUDA is OFF")
    return()
  endif()
  find_nvcc()
  if(NOT nvcc AND SPARSE_KERNELS_CUDA STREQUAL ON)
    message(FATAL_ERROR
      "SPARSE_KERNELS_CUDA is ON, but the CUDA kernels cannot be compiled: ${no_nvcc}. Install "
      "CUDA's toolkit, 12.0 or newer, or leave them to be compiled at first use (OFF or AUTO).")
  endif()
  if(NOT nvcc)
    message(STATUS "CUDA kernels: not compiled, ${no_nvcc}")
    return()
  endif()
  set(architectures ${SPARSE_KERNELS_CUDA_ARCHITECTURES})
  message(STATUS "CUDA kernels: ${nvcc} (CUDA ${nvcc_version}) for ${architectures} and PTX")
  list(GET architectures 0 first)
  set(code -gencode=arch=compute_${first},code=compute_${first})
  foreach(architecture ${architectures})
    list(APPEND code -gencode=arch=compute_${architecture},code=sm_${architecture})
  endforeach()
  file(GLOB texts CONFIGURE_DEPENDS ${folder}/*.cuh)
  set(image ${CMAKE_CURRENT_BINARY_DIR}/kernels.fatbin)
  # Sums that are fused in one place and not in another would make bits depend on the shape of a
  # call. Architectures side by side, but only two: each takes some hundred MB.
  add_custom_command(
    OUTPUT ${image}
    COMMAND ${nvcc} -ccbin ${CMAKE_CXX_COMPILER} -std=c++17 -O3 --fmad=false --threads 2 ${code}
            -fatbin ${folder}/kernels.cu -o ${image}
    DEPENDS ${folder}/kernels.cu ${folder}/arguments.hpp ${texts}
    COMMENT "Compiling the CUDA kernels for ${architectures}"
    VERBATIM)
  set_source_files_properties(${folder}/image.cpp PROPERTIES
    OBJECT_DEPENDS ${image}
    COMPILE_DEFINITIONS
      "SPARSE_KERNELS_IMAGE=\"${image}\";SPARSE_KERNELS_IMAGE_CUDA=\"${nvcc_version}\"")
endfunction()
