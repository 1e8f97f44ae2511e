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
    typedef typename Raw<sizeof(T) * VEC>::type raw_t;
    raw_t raw;
    T at[VEC];
};
typedef Pack<X_T> Vector;
typedef Pack<unsigned char> Bytes;

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

// VEC neighbouring elements of a row, of which those from `first` to `last` exist and are this thread's.
struct Window {
    index_t row;
    index_t offset;
    int first, last;

    __device__ bool any() const { return first < last; }
    __device__ bool whole() const { return RAGGED ? last - first == VEC : last > 0; }
    __device__ bool holds(int i) const { return !RAGGED || (first <= i && i < last); }
};

// One thread's way through one tile: `steps` windows, then empty ones for ever.
struct Walk {
    int group, split;
    index_t row, window;
    int row_step, window_step;
    int steps, step;

    __device__ Walk(const Tiles &tiles, int tile) : Walk(tiles, tile % tiles.groups, tile / tiles.groups) {}

    __device__ Walk(const Tiles &tiles, int group, int split) : group(group), split(split)
    {
        step = 0;
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
        } else {
            const index_t begin = split * tiles.part + threadIdx.x;
            const index_t end = min(tiles.rows * tiles.windows, (split + 1) * tiles.part);
            row = begin / tiles.windows;
            window = begin - row * tiles.windows;
            row_step = tiles.windows > BLOCK ? 0 : BLOCK / int(tiles.windows);
            window_step = int(BLOCK - row_step * tiles.windows);
            steps = begin < end ? (int(end - begin) + BLOCK - 1) / BLOCK : 0;
        }
    }

    // The next window.  `anchor` is any tensor of the call, with its stride: they all lie alike, up to whole windows.
    __device__ Window next(const Tiles &tiles, const X_T *anchor, index_t stride)
    {
        const Window w = here(tiles, anchor, stride);
        ++step;
        row += row_step;
        window += window_step;
        if (window >= tiles.windows) {
            window -= tiles.windows;
            ++row;
        }
        return w;
    }

    // The one before the next: what next() gave last, if nothing else was called in between.
    __device__ Window back(const Tiles &tiles, const X_T *anchor, index_t stride)
    {
        --step;
        row -= row_step;
        window -= window_step;
        if (window < 0) {
            window += tiles.windows;
            --row;
        }
        return here(tiles, anchor, stride);
    }

  private:
    __device__ Window here(const Tiles &tiles, const X_T *anchor, index_t stride) const
    {
        Window w;
        w.row = row;
        w.offset = window * VEC;
        w.first = 0;
        w.last = step < steps ? VEC : 0;
        if (COLUMN && RAGGED && step < steps && row == tiles.rows - 1)
            w.last = int(max(index_t(0), min(index_t(VEC), tiles.tail - w.offset)));
        if (!COLUMN) w.offset += group * tiles.inner;
        if (!COLUMN && RAGGED && step < steps) {  // windows are aligned in memory, planes are not
            const index_t plane = reinterpret_cast<unsigned long long>(anchor + row * stride + group * tiles.inner);
            const int lead = int(plane / sizeof(X_T)) & (VEC - 1);
            w.offset -= lead;
            w.first = window == 0 ? lead : 0;
            w.last = int(max(index_t(0), min(index_t(VEC), tiles.inner + lead - window * VEC)));
        }
        return w;
    }
};

// The channels of a thread's lanes, one call after the other.
struct Channels {
    index_t channel;
    int left;  // lanes that are still in it

    __device__ Channels(const Tiles &tiles, const Walk &walk)
    {
        channel = walk.group;
        if (!COLUMN) return;
        const int across = threadIdx.x % tiles.width * VEC;
        const int run = across / int(tiles.inner);
        channel = index_t(walk.group) * tiles.runs() + run;
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

__device__ inline Vector load(const X_T *x, index_t stride, const Window &w)
{
    return load(x + w.row * stride + w.offset, w, w.whole());
}

__device__ inline void store(X_T *y, index_t stride, const Window &w, const Vector &v)
{
    store(y + w.row * stride + w.offset, w, w.whole(), v);
}

// The same of masks: one byte for each element, 0 or 1, dense and aligned for themselves.
__device__ inline Bytes load(const unsigned char *mask, const Tiles &tiles, const Window &w)
{
    return load(mask + w.row * tiles.row_length() + w.offset, w, !RAGGED && w.whole());
}

__device__ inline void store(unsigned char *mask, const Tiles &tiles, const Window &w, const Bytes &v)
{
    store(mask + w.row * tiles.row_length() + w.offset, w, !RAGGED && w.whole(), v);
}
