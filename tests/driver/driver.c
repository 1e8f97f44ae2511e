/* A CUDA driver and runtime without a device, for CuPy.

   Memory is the host's.  Streams, events and graphs are there, and everything happens at once, in the order in which
   the host asks for it.  A launch is checked as a driver checks it, counted, and handed to `stand_in_launch`, or to
   nobody.

   What it cannot do: run anything at the same time as anything else, so that no missing wait or missing order between
   streams shows; copy or set memory while a stream is captured; know how many blocks really fit, or how large the
   clusters of a kernel are; textures, peers, memory pools, linking.  A function of the runtime that is not here is the
   runtime's own, which finds no device behind this driver and fails.

   The runtime is part of CuPy's binaries, so under_cupy.py redirects its functions to those named stand_in_cuda...;
   the driver is looked up by the name libcuda.so.1, which this library bears. */

#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define API __attribute__((visibility("default"))) int
#define ASK(name) API stand_in_##name /* a function of the runtime */

enum { SUCCESS, INVALID_VALUE, OUT_OF_MEMORY, NO_DEVICE = 101, INVALID_CONTEXT = 201, INVALID_HANDLE = 400,
       TOO_MANY_COOPERATIVE_BLOCKS = 720, CAPTURE_UNSUPPORTED = 900 };
enum { MULTIPROCESSORS = 16, ATTRIBUTES = 256, FUNCTION_ATTRIBUTES = 32 }; /* 16: cudaDevAttrMultiProcessorCount */
enum { FUNCTION_THREADS, FUNCTION_REGISTERS = 4, FUNCTION_DYNAMIC_BYTES = 8 }; /* CU_FUNC_ATTRIBUTE_... of cuda.h */
enum { PLAIN_DYNAMIC_BYTES = 48 * 1024, ALIGNMENT = 512, NAME = 256 };
enum { PER_THREAD_STREAM = 2 }; /* the largest of the handles that are no pointers */

typedef struct { int64_t allocations, frees, launches, synchronisations, memsets, copies; } Counts;
typedef struct { char unused; } Graph; /* its launches are kept by who computes them */
typedef struct { Graph *graph; } Stream; /* the graph that it is captured into, or none */
typedef struct { char name[NAME]; void *module; int device, attributes[FUNCTION_ATTRIBUTES]; } Function;
typedef struct { unsigned grid[3], block[3], shared; void *stream, *attributes; unsigned attribute_count; } Config;
typedef struct { int type, device; void *device_pointer, *host_pointer; } PointerAttributes; /* its beginning */

/* What under_cupy.py reads and sets */

API stand_in_devices = 2, stand_in_version = 13000, stand_in_refusal = SUCCESS, stand_in_attributes[ATTRIBUTES],
    stand_in_blocks_per_processor = 2, stand_in_clusters = 16;
__attribute__((visibility("default"))) Counts stand_in_counts;
__attribute__((visibility("default"))) char stand_in_fault[2048] = "the stand-in for a driver refuses";
__attribute__((visibility("default"))) void *(*stand_in_allocate)(size_t), (*stand_in_release)(void *);
__attribute__((visibility("default"))) int (*stand_in_replay)(Graph *);
__attribute__((visibility("default"))) int (*stand_in_launch)(
    void *module, const char *name, unsigned grid, unsigned block, unsigned shared, void **arguments, int cooperative,
    Graph *graph);

static __thread int current;              /* device of this thread, */
static __thread unsigned entered;         /* and a bit for each whose context is there */
static int count(int64_t *what) { __atomic_add_fetch(what, 1, __ATOMIC_RELAXED); return SUCCESS; }
#define COUNT(what) count(&stand_in_counts.what)
static int set(int *place, int value) { *place = value; return SUCCESS; }
static int make(void **place, size_t size) { return (*place = calloc(1, size)) ? SUCCESS : OUT_OF_MEMORY; }
static Graph *captured(Stream *s) { return (uintptr_t)s > PER_THREAD_STREAM ? s->graph : NULL; }

/* Devices */

ASK(cudaGetDevice)(int *d) { return set(d, current); }
ASK(cudaSetDevice)(int d) { return d >= 0 && d < stand_in_devices ? set(&current, d) : NO_DEVICE; }
ASK(cudaGetDeviceCount)(int *n) { return set(n, stand_in_devices); }
ASK(cudaDeviceGetAttribute)(int *v, int a, int d)
{
    return a < ATTRIBUTES ? set(v, stand_in_attributes[a]) : INVALID_VALUE;
}
ASK(cudaDeviceCanAccessPeer)(int *yes, int a, int b) { return set(yes, 0); }
ASK(cudaDeviceSynchronize)(void) { return COUNT(synchronisations); }
ASK(cudaRuntimeGetVersion)(int *v) { return set(v, stand_in_version); }
ASK(cudaDriverGetVersion)(int *v) { return set(v, stand_in_version); }
ASK(cudaGetLastError)(void) { return SUCCESS; }
ASK(cudaPeekAtLastError)(void) { return SUCCESS; }

ASK(cudaGetDeviceProperties)(char *properties, int d)
{
    memset(properties, 0, 512); /* the structure begins with the name; its length depends on the version */
    strcpy(properties, "stand-in for a device");
    return SUCCESS;
}

/* Memory */

ASK(cudaMemGetInfo)(size_t *free, size_t *total)
{
    entered |= 1u << current; /* the one call of the runtime that CuPy and cubn enter a context by */
    *free = *total = (size_t)1 << 34;
    return SUCCESS;
}

ASK(cudaMalloc)(void **p, size_t n)
{
    COUNT(allocations);
    *p = stand_in_allocate ? stand_in_allocate(n) : aligned_alloc(ALIGNMENT, (n + ALIGNMENT) / ALIGNMENT * ALIGNMENT);
    return *p ? SUCCESS : OUT_OF_MEMORY;
}

ASK(cudaFree)(void *p)
{
    if (!p) return SUCCESS;
    if (stand_in_release) stand_in_release(p);
    else if (!stand_in_allocate) free(p); /* else it is not ours, and who it belongs to is gone */
    return COUNT(frees);
}

static int copy(void *to, const void *from, size_t n, Stream *s)
{
    if (captured(s)) return CAPTURE_UNSUPPORTED;
    memcpy(to, from, n);
    return COUNT(copies);
}

static int fill(void *p, int value, size_t n, Stream *s)
{
    if (captured(s)) return CAPTURE_UNSUPPORTED;
    memset(p, value, n);
    return COUNT(memsets);
}

ASK(cudaMemcpy)(void *to, const void *from, size_t n, int kind) { return copy(to, from, n, NULL); }
ASK(cudaMemcpyAsync)(void *to, const void *from, size_t n, int kind, Stream *s) { return copy(to, from, n, s); }
ASK(cudaMemset)(void *p, int value, size_t n) { return fill(p, value, n, NULL); }
ASK(cudaMemsetAsync)(void *p, int value, size_t n, Stream *s) { return fill(p, value, n, s); }
ASK(cudaHostAlloc)(void **p, size_t n, unsigned flags) { return make(p, n); }
ASK(cudaFreeHost)(void *p) { free(p); return SUCCESS; }

ASK(cudaPointerGetAttributes)(PointerAttributes *a, void *p)
{
    *a = (PointerAttributes){2, current, p, NULL}; /* 2: cudaMemoryTypeDevice; whose it is, nobody has noted */
    return SUCCESS;
}

/* Streams, events, graphs */

ASK(cudaStreamCreate)(void **s) { return make(s, sizeof(Stream)); }
ASK(cudaStreamCreateWithFlags)(void **s, unsigned flags) { return make(s, sizeof(Stream)); }
ASK(cudaStreamCreateWithPriority)(void **s, unsigned flags, int priority) { return make(s, sizeof(Stream)); }
ASK(cudaStreamDestroy)(Stream *s) { free(s); return SUCCESS; }
ASK(cudaStreamSynchronize)(Stream *s) { return captured(s) ? CAPTURE_UNSUPPORTED : COUNT(synchronisations); }
ASK(cudaStreamQuery)(Stream *s) { return SUCCESS; }
ASK(cudaStreamWaitEvent)(Stream *s, void *event, unsigned flags) { return SUCCESS; }
ASK(cudaStreamIsCapturing)(Stream *s, int *yes) { return set(yes, captured(s) != NULL); }
ASK(cudaStreamBeginCapture)(Stream *s, int mode)
{
    if ((uintptr_t)s <= PER_THREAD_STREAM || s->graph) return CAPTURE_UNSUPPORTED;
    return make((void **)&s->graph, sizeof(Graph));
}
ASK(cudaStreamEndCapture)(Stream *s, Graph **g)
{
    *g = captured(s);
    if (!*g) return CAPTURE_UNSUPPORTED;
    s->graph = NULL;
    return SUCCESS;
}
ASK(cudaGraphInstantiate)(Graph **executable, Graph *g) { *executable = g; return SUCCESS; }
ASK(cudaGraphUpload)(Graph *g, Stream *s) { return SUCCESS; }
ASK(cudaGraphLaunch)(Graph *g, Stream *s) { return stand_in_replay ? stand_in_replay(g) : SUCCESS; }
ASK(cudaGraphDestroy)(Graph *g) { return SUCCESS; } /* never freed: a handle stands for one graph for ever */
ASK(cudaGraphExecDestroy)(Graph *g) { return SUCCESS; }

ASK(cudaEventCreate)(void **e) { return make(e, sizeof(struct timespec)); }
ASK(cudaEventCreateWithFlags)(void **e, unsigned flags) { return make(e, sizeof(struct timespec)); }
ASK(cudaEventDestroy)(void *e) { free(e); return SUCCESS; }
ASK(cudaEventRecord)(void *e, Stream *s) { return clock_gettime(CLOCK_MONOTONIC, e); }
ASK(cudaEventQuery)(void *e) { return SUCCESS; }
ASK(cudaEventSynchronize)(void *e) { return COUNT(synchronisations); }
ASK(cudaEventElapsedTime)(float *ms, struct timespec *a, struct timespec *b)
{
    *ms = (b->tv_sec - a->tv_sec) * 1e3f + (b->tv_nsec - a->tv_nsec) * 1e-6f;
    return SUCCESS;
}

/* The driver: contexts, modules, functions */

API cuGetErrorString(int error, const char **text) { *text = stand_in_fault; return SUCCESS; }
API cuGetErrorName(int error, const char **name)
{
    static __thread char text[32];
    snprintf(text, sizeof text, "CUDA_ERROR %d", error);
    *name = text;
    return SUCCESS;
}
API cuCtxGetCurrent(void **context) { *context = (void *)(uintptr_t)(entered >> current & 1); return SUCCESS; }
API cuCtxSetCurrent(void *context) { return SUCCESS; }
API cuCtxGetDevice(int *d) { return set(d, current); }
API cuStreamGetCtx(Stream *s, void **context) { return cuCtxGetCurrent(context); }
API cuModuleLoadData(void **module, const void *image) { return make(module, 1); }
API cuModuleUnload(void *module) { return SUCCESS; } /* never freed, likewise */
API cuModuleGetFunction(Function **f, void *module, const char *name)
{
    if (make((void **)f, sizeof **f)) return OUT_OF_MEMORY;
    snprintf((*f)->name, NAME, "%s", name);
    (*f)->module = module;
    (*f)->device = current;
    (*f)->attributes[FUNCTION_THREADS] = 1024;
    (*f)->attributes[FUNCTION_REGISTERS] = 64;
    return SUCCESS;
}
API cuFuncGetAttribute(int *v, int a, Function *f)
{
    return a < FUNCTION_ATTRIBUTES ? set(v, f->attributes[a]) : INVALID_VALUE;
}
API cuFuncSetAttribute(Function *f, int a, int v)
{
    return a < FUNCTION_ATTRIBUTES ? set(&f->attributes[a], v) : INVALID_VALUE;
}
API cuOccupancyMaxActiveBlocksPerMultiprocessor(int *n, Function *f, int block, size_t shared)
{
    return set(n, stand_in_blocks_per_processor);
}
API cuOccupancyMaxActiveClusters(int *n, Function *f, const Config *c)
{
    return c->grid[0] && c->block[0] && !c->attribute_count ? set(n, stand_in_clusters) : INVALID_VALUE;
}

/* Launches */

static int launch(Function *f, const unsigned grid[3], const unsigned block[3], unsigned shared, Stream *s,
                  void **arguments, int cooperative)
{
    if (stand_in_refusal) return stand_in_refusal;
    if (!(entered >> current & 1)) return INVALID_CONTEXT;
    if (f->device != current) return INVALID_HANDLE;
    if (grid[1] * grid[2] * block[1] * block[2] != 1 || !grid[0] || !block[0]) return INVALID_VALUE;
    if (shared > PLAIN_DYNAMIC_BYTES && (int)shared > f->attributes[FUNCTION_DYNAMIC_BYTES]) return INVALID_VALUE;
    if (cooperative && (int)grid[0] > stand_in_blocks_per_processor * stand_in_attributes[MULTIPROCESSORS])
        return TOO_MANY_COOPERATIVE_BLOCKS;
    COUNT(launches);
    if (!stand_in_launch) return SUCCESS;
    return stand_in_launch(f->module, f->name, grid[0], block[0], shared, arguments, cooperative, captured(s));
}
API cuLaunchKernel(Function *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, Stream *s, void **arguments, void **extra)
{
    return launch(f, (unsigned[]){gx, gy, gz}, (unsigned[]){bx, by, bz}, shared, s, arguments, 0);
}
API cuLaunchCooperativeKernel(Function *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                              unsigned shared, Stream *s, void **arguments)
{
    return launch(f, (unsigned[]){gx, gy, gz}, (unsigned[]){bx, by, bz}, shared, s, arguments, 1);
}
