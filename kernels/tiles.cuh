// tiles.cuh: how the blocks of a grid share out a tensor, and which elements each thread visits.
//
//   Constants  BLOCK   threads of a block
//              COLUMN  0 plane map, 1 column map
//              VEC     elements of a window: 16 bytes, or 1 where the tensors lie too differently in memory
//              RAGGED  1 if a window may reach over the end of its row
//              UNROLL  windows that a thread has in flight
//
// The canonical form (outer, channels, inner) is read in windows of VEC neighbouring elements, in one of two maps.
//
//   plane map    for a long inner run.  A tile is `part` windows of one channel, counted through its planes
//                (o, c, :); neighbouring threads take neighbouring windows.  All of a tile is one channel.
//   column map   for a short one, 1 included.  `fold` outer rows (o, :, :) make one row of a matrix; a tile is
//                `width` windows of a row wide, which is a whole number of runs (:, c, :), and `part` rows high.
//                A thread keeps its columns, so each of its VEC lanes stays in one channel.
//
// A tensor has its own stride between rows and is dense within them.  Every element is in exactly one window of
// one thread of one tile, whatever the grid.

#pragma once

#include "scalar.cuh"

constexpr int LANES = COLUMN ? VEC : 1;  // channels that a thread sums at a time

// What one instruction loads or stores.
template <int BYTES> struct Raw;
template <> struct Raw<1> { typedef unsigned char type; };
template <> struct Raw<2> { typedef unsigned short type; };
template <> struct Raw<4> { typedef unsigned type; };
template <> struct Raw<8> { typedef uint2 type; };
template <> struct Raw<16> { typedef uint4 type; };

template <class T>
union Pack {
    static constexpr int BYTES = sizeof(T) * VEC, WORD = BYTES < 4 ? BYTES : 4;
    typedef typename Raw<BYTES>::type raw_t;
    raw_t raw;
    T at[VEC];
    typename Raw<WORD>::type word[BYTES / WORD];
};
typedef Pack<X_T> Vector;
typedef Pack<unsigned char> Bytes;

constexpr bool PAIRS = sizeof(X_T) == 2 && VEC > 1;  // elements lie two to a register

// The elements of a window in ACC_T, and back.  Indices are known when the loops around them are unrolled.
#if X_TYPE < 2
__device__ inline ACC_T element(const Vector &v, int i)
{
    if constexpr (PAIRS) return i % 2 ? high_of(v.word[i / 2]) : low_of(v.word[i / 2]);
    else return to_acc(v.at[i]);
}

__device__ inline Vector pack(const ACC_T (&of)[VEC])
{
    Vector v;
    if constexpr (PAIRS) {
#pragma unroll
        for (int i = 0; i < VEC; i += 2) v.word[i / 2] = pair_of(of[i], of[i + 1]);
    } else {
        v.at[0] = from_acc(of[0]);
    }
    return v;
}
#else
__device__ inline ACC_T element(const Vector &v, int i) { return v.at[i]; }

__device__ inline Vector pack(const ACC_T (&of)[VEC])
{
    Vector v;
#pragma unroll
    for (int i = 0; i < VEC; ++i) v.at[i] = of[i];
    return v;
}
#endif

// Sets all elements to zero but those whose bit is set.
__device__ inline void clear_but(Vector &v, unsigned bits)
{
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
        if constexpr (PAIRS) v.word[i / 2] &= bits >> i & 1 ? ~0u : i % 2 ? 0xffffu : 0xffff0000u;
        else if (!(bits >> i & 1)) v.at[i] = X_T(0);
    }
}

// Sizes, equal in all threads.
struct Tiles {
    index_t rows;      // outer, or rows of the matrix
    index_t channels, inner;
    index_t windows;   // in a plane, or in a row of the matrix
    index_t tail;      // elements of the last row of the matrix, which may hold fewer outer rows than the others
    index_t part;      // windows (plane) or matrix rows (column) of a tile
    int groups;        // tiles side by side: channels, or tiles of a row of the matrix
    int splits;        // tiles that the samples of a channel are spread over; groups * splits is below 2^30
    int width;         // windows side by side in a tile; plane: 1
    int fold;          // outer rows in a row; plane: 1

    __device__ int count() const { return groups * splits; }
    __device__ int high() const { return BLOCK / width; }            // rows that a block takes at a time
    __device__ int runs() const { return width * VEC / int(inner); } // in a tile of the column map
    __device__ index_t row_length() const { return channels * inner * fold; }
};

// VEC neighbouring elements, of which those from `first` to `last` exist and are this thread's.
struct Window {
    int first, last;

    __device__ bool whole() const { return !RAGGED || last - first == VEC; }
    __device__ bool holds(int i) const { return !RAGGED || (first <= i && i < last); }
};

constexpr int FORTH = 1, BACK = -1;

// From one window of a thread to its next, in any tensor.
struct Move {
    bool turned;  // to another row sooner than by whole rows
    int shift;    // ragged planes: of the first window against the first element
};

// One thread's way through one tile: `steps` windows, FORTH from the first one or BACK from the last one.  Only the
// place where it begins takes divisions and products.  From there on a thread counts, in 32 bits, the windows that its
// plane still has ahead, and moves a Cursor for each tensor by one of two distances.
template <int DIRECTION>
struct Walk {
    int group, split;
    int steps;
    index_t row, window;         // where it begins
    int row_step, window_step;   // rows, and in the plane map windows, to the next window of this thread
    int windows, ahead;          // plane map: of a plane, and of those the ones ahead; FAR at most, which is too many
    int lead, lead_step;         // ragged planes: elements of a window before the plane's first, and their change by row
    index_t below;               // ragged columns: rows below this one
    int last;                    // ragged: elements of the last row in a window, or of a plane behind its windows

    // More windows than a tile has.  Ragged planes have fewer, which the plan sees to.
    static constexpr index_t FAR = (1 << 30) + 2 * BLOCK;

    __device__ Walk(const Tiles &tiles, int tile, const X_T *anchor, index_t stride)
        : Walk(tiles, tile % tiles.groups, tile / tiles.groups, anchor, stride) {}

    // `anchor` is any tensor of the call, with its stride: they all lie alike, up to whole windows.
    __device__ Walk(const Tiles &tiles, int group, int split, const X_T *anchor, index_t stride)
        : group(group), split(split)
    {
        windows = ahead = lead = lead_step = last = 0;
        below = 0;
        if (COLUMN) {
            const int down = threadIdx.x / tiles.width;
            const int across = threadIdx.x - down * tiles.width;
            const index_t end = min(tiles.rows, (split + 1) * tiles.part);
            row = split * tiles.part + down;
            window = index_t(group) * tiles.width + across;
            row_step = tiles.high();
            window_step = 0;
            const bool inside = down < row_step && window < tiles.windows && row < end;
            steps = inside ? (int(end - row) + row_step - 1) / row_step : 0;
            if (DIRECTION == BACK) row += index_t(steps - 1) * row_step;
            below = tiles.rows - 1 - row;
            last = int(max(index_t(0), min(index_t(VEC), tiles.tail - window * VEC)));
        } else {
            index_t begin = split * tiles.part + threadIdx.x;
            const index_t end = min(tiles.rows * tiles.windows, (split + 1) * tiles.part);
            steps = begin < end ? (int(end - begin) + BLOCK - 1) / BLOCK : 0;
            if (DIRECTION == BACK && steps > 0) begin += index_t(steps - 1) * BLOCK;
            row = begin / tiles.windows;
            window = begin - row * tiles.windows;
            row_step = tiles.windows > BLOCK ? 0 : BLOCK / int(tiles.windows);
            window_step = int(BLOCK - row_step * tiles.windows);
            windows = int(min(tiles.windows, FAR));
            ahead = int(min(DIRECTION == FORTH ? tiles.windows - 1 - window : window, FAR));
            if (RAGGED) {  // windows are aligned in memory, planes are not
                const index_t plane = reinterpret_cast<unsigned long long>(anchor + row * stride + group * tiles.inner);
                lead = int(plane / sizeof(X_T)) & (VEC - 1);
                lead_step = int(stride) & (VEC - 1);
                last = int(tiles.inner - tiles.windows * VEC);
            }
        }
    }

    // The window that it stands at.
    __device__ Window here() const
    {
        if (!RAGGED) return {0, VEC};
        if (COLUMN) return {0, below == 0 ? last : VEC};
        const int before = DIRECTION == FORTH ? windows - 1 - ahead : ahead;
        return {before == 0 ? lead : 0, max(0, min(VEC, min(windows - before, 3) * VEC + last + lead))};
    }

    // Goes on by one window, with these cursors.
    template <class... Cursors>
    __device__ Move next(Cursors &...cursors)
    {
        below -= DIRECTION * row_step;
        ahead -= window_step;
        const bool turned = !COLUMN && ahead < 0;
        if (turned) ahead += windows;
        const int before = lead;
        if (RAGGED) lead = (lead + DIRECTION * (row_step + turned) * lead_step) & (VEC - 1);
        const Move move = {turned, before - lead};
        (cursors.go(move), ...);
        return move;
    }
};

// Where a walk stands in one tensor: a pointer, or the index of an element for whatever is dense.  A tensor that is not
// there may have one, as long as nothing is read from it.
template <class Place>
struct Cursor {
    Place at;
    index_t step, turn;  // elements to the next window of a row, and what is added where the row ends

    template <int DIRECTION>
    __device__ Cursor(Place from, index_t stride, const Tiles &tiles, const Walk<DIRECTION> &walk)
    {
        at = from + walk.row * stride + walk.window * VEC + (COLUMN ? 0 : walk.group * tiles.inner - walk.lead);
        step = DIRECTION * (walk.row_step * stride + walk.window_step * VEC);
        turn = COLUMN ? 0 : DIRECTION * (stride - tiles.windows * VEC);
    }

    __device__ void go(const Move &move)
    {
        at += move.turned ? step + turn : step;
        if (RAGGED && !COLUMN) at += move.shift;
    }
};
typedef Cursor<const X_T *> Source;
typedef Cursor<X_T *> Target;
typedef Cursor<index_t> Index;

template <int DIRECTION>
__device__ Index dense_index(const Tiles &tiles, const Walk<DIRECTION> &walk)
{
    return Index(0, tiles.row_length(), tiles, walk);
}

// The channels of a thread's lanes, one call after the other.
struct Channels {
    index_t channel;
    int left;  // lanes that are still in it

    __device__ Channels(const Tiles &tiles, int group)
    {
        channel = group;
        if (!COLUMN) return;
        const int across = threadIdx.x % tiles.width * VEC;
        const int run = across / int(tiles.inner);
        channel = index_t(group) * tiles.runs() + run;
        left = int(tiles.inner) - (across - run * int(tiles.inner));
    }

    __device__ index_t next(const Tiles &tiles)
    {
        while (channel >= tiles.channels) channel -= tiles.channels;  // at most `fold` times
        const index_t here = channel;
        if (COLUMN && --left == 0) {
            ++channel;
            left = int(tiles.inner);
        }
        return here;
    }
};

// The elements of a window; those that do not exist come as zeros and are not touched.  `whole` says that all of
// them can be moved at once.
template <class T>
__device__ Pack<T> load(const T *from, const Window &w, bool whole)
{
    Pack<T> v;
    if (whole) {
        v.raw = *reinterpret_cast<const typename Pack<T>::raw_t *>(from);
        return v;
    }
    for (int i = 0; i < VEC; ++i) v.at[i] = RAGGED && w.holds(i) ? from[i] : T(0);
    return v;
}

template <class T>
__device__ void store(T *to, const Window &w, bool whole, const Pack<T> &v)
{
    // An assignment would be taken apart into stores of 4 bytes.
    if (whole) __stwb(reinterpret_cast<typename Pack<T>::raw_t *>(to), v.raw);
    else if (RAGGED)
        for (int i = 0; i < VEC; ++i)
            if (w.holds(i)) to[i] = v.at[i];
}

__device__ inline Vector load(const X_T *from, const Window &w) { return load(from, w, w.whole()); }
__device__ inline void store(X_T *to, const Window &w, const Vector &v) { store(to, w, w.whole(), v); }

// The same of masks: one byte for each element, 0 or 1, dense and aligned for themselves.
__device__ inline Bytes load(const unsigned char *from, const Window &w) { return load(from, w, !RAGGED); }
__device__ inline void store(unsigned char *to, const Window &w, const Bytes &v) { store(to, w, !RAGGED, v); }
