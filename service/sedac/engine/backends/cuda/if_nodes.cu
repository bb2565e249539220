// IF nodes in a graph that a stream is capturing, for a torch without CUDAGraph.begin_capture_to_if_node (see if_nodes.py).
// CUDA runtime API of 12.4 and newer, "Conditional Graph Nodes" in the CUDA programming guide. Every function returns a cudaError_t.
#include <cuda_runtime.h>

namespace {

__global__ void set_condition(cudaGraphConditionalHandle handle, const bool* wanted) {
  cudaGraphSetConditional(handle, *wanted ? 1u : 0u);
}

struct Capture {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  cudaGraph_t graph = nullptr;
  const cudaGraphNode_t* nodes = nullptr;
  const cudaGraphEdgeData* edges = nullptr;
  size_t count = 0;
};

cudaError_t look(cudaStream_t stream, Capture* found) {
  unsigned long long id = 0;
#if CUDART_VERSION >= 13000
  return cudaStreamGetCaptureInfo(stream, &found->status, &id, &found->graph, &found->nodes, &found->edges, &found->count);
#else
  return cudaStreamGetCaptureInfo_v3(stream, &found->status, &id, &found->graph, &found->nodes, &found->edges, &found->count);
#endif
}

cudaError_t add(cudaGraphNode_t* node, const Capture& at, cudaGraphNodeParams* params) {
#if CUDART_VERSION >= 13000
  return cudaGraphAddNode(node, at.graph, at.nodes, at.edges, at.count, params);
#else
  return cudaGraphAddNode_v2(node, at.graph, at.nodes, at.edges, at.count, params);
#endif
}

cudaError_t go_on_behind(cudaStream_t stream, cudaGraphNode_t* node) {
#if CUDART_VERSION >= 13000
  return cudaStreamUpdateCaptureDependencies(stream, node, nullptr, 1, cudaStreamSetCaptureDependencies);
#else
  return cudaStreamUpdateCaptureDependencies(stream, node, 1, cudaStreamSetCaptureDependencies);
#endif
}

}  // namespace

#define TRY(call)                               \
  do {                                          \
    cudaError_t error = (call);                 \
    if (error != cudaSuccess) return int(error); \
  } while (0)

extern "C" {

// Load the kernel now: a module can't be loaded lazily while a stream is being captured.
int sedac_if_prepare() {
  cudaFuncAttributes attributes;
  TRY(cudaFuncGetAttributes(&attributes, set_condition));
  return 0;
}

// Add an IF node behind what `stream` has captured, and let `body` capture into it; `wanted` (device memory) is read at each replay.
int sedac_if_begin(void* stream_, void* body_, const bool* wanted) {
  auto stream = static_cast<cudaStream_t>(stream_), body = static_cast<cudaStream_t>(body_);
  Capture at;
  TRY(look(stream, &at));
  if (at.status != cudaStreamCaptureStatusActive) return int(cudaErrorIllegalState);
  cudaGraphConditionalHandle handle;
  TRY(cudaGraphConditionalHandleCreate(&handle, at.graph, 0, 0));
  set_condition<<<1, 1, 0, stream>>>(handle, wanted);
  TRY(cudaGetLastError());
  TRY(look(stream, &at));  // the launch has become the node that the IF node waits for
  cudaGraphNodeParams params = {};
  params.type = cudaGraphNodeTypeConditional;
  params.conditional.handle = handle;
  params.conditional.type = cudaGraphCondTypeIf;
  params.conditional.size = 1;
  cudaGraphNode_t node;
  TRY(add(&node, at, &params));
  TRY(go_on_behind(stream, &node));
  return int(cudaStreamBeginCaptureToGraph(body, params.conditional.phGraph_out[0], nullptr, nullptr, 0, cudaStreamCaptureModeRelaxed));
}

// End the body that `body` captures; whatever it forked must have been joined.
int sedac_if_end(void* body) {
  cudaGraph_t graph;
  return int(cudaStreamEndCapture(static_cast<cudaStream_t>(body), &graph));
}

const char* sedac_if_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
}
