// rows.cu: sums of the rows of a matrix, one row after another per block.  Every line is needed.

extern "C" __global__ void __launch_bounds__(64) row_sums(const float *x, float *sums, int rows, int length)
{
    __shared__ float partial[64];
    for (int row = blockIdx.x; row < rows; row += gridDim.x) {
        float total = 0;
        for (int i = threadIdx.x; i < length; i += 64) total += x[row * length + i];
        partial[threadIdx.x] = total;
        __syncthreads();
        if (threadIdx.x == 0) {
            for (int t = 1; t < 64; ++t) total += partial[t];
            sums[row] = total;
        }
        __syncthreads();
    }
}
