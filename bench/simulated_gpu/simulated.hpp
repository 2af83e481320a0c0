// A GPU whose kernels do nothing: what the source files share, and the log that the calls write.
//
// The log has one line per event, its fields separated by |:
//   MARK|text                                              simulated_gpu_mark, called by the program under test
//   KERNEL|symbol|grid|block|shared bytes                  a launch of a kernel that torch brings along
//   TRITON|name|grid|block|shared bytes|registers          a launch of a kernel that Triton compiled
//   GEMM|call|NN, NT, TN or TT|m=,n=,k=,b=|type->type|ep=  a matrix product: b matrices, ep: cuBLASLt's epilogue
//   SOLVER|name|n=,rhs=,b=                                 a dense factorisation or solution
//   MEMCPY|H2H, H2D, D2H, D2D or DEF|bytes     MEMCPY2D|bytes     MEMSET|bytes     MALLOC|bytes
//   SYNC|what                                              the host waits for the device
//   GRAPH|begin, end, launch, fork, join, illegal or outside|...   capture of a CUDA graph, held to CUDA's rules
//   UNKNOWN|name                                           a driver call that is asked for and not simulated
#pragma once
#include <cstddef>

namespace simulated {

// One line of the log; a line feed is added.
void log(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Whether the host's own time is being taken: nothing is logged, and only small copies and memsets are carried out.
bool timed();

int architecture();     // compute capability, 80 or 90
size_t memory_bytes();  // of the whole device
int attribute(int which);  // a CUdevice_attribute

// Device memory is host memory that is mapped when it is touched.  allocate gives nullptr where the device is full.
void* allocate(size_t bytes);
void release(void* address);

// A handle of a stream, event or library: a number that no other handle has.
void* new_handle();

// ---- capture of CUDA graphs
void captured(void* stream, const char* what);  // work is enqueued: a node, if the stream is being captured
// Both give CUDA's error, 0 where there is none; an illegal call invalidates the capture.
int illegal(const char* what);                  // not allowed while anything is being captured
int unsafe(const char* what);                   // the same, as far as the modes of the thread and the capture forbid it

// ---- cuBLAS and cuSOLVER: the stream that a handle works on
void bind_stream(void* library, void* stream);
void* stream_of(void* library);

}  // namespace simulated
