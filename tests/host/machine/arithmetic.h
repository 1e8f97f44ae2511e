// arithmetic.h: PTX's instructions on registers, as C++.
//
// A register holds raw bits (bool, u16, u32 or u64); as<T>(bits) views them as a type and put(register, value) stores.

#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#define INLINE [[maybe_unused]] static inline __attribute__((always_inline))

using pred = bool;
using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using b8 = u8;
using b16 = u16;
using b32 = u32;
using b64 = u64;
using f32 = float;
using f64 = double;
struct f16 {
    u16 bits;
};
struct bf16 {
    u16 bits;
};

template <class T> constexpr bool is_half = std::is_same_v<T, f16> || std::is_same_v<T, bf16>;
template <class T> constexpr bool is_float = is_half<T> || std::is_floating_point_v<T>;
template <class T> constexpr bool is_signed_integer = std::is_integral_v<T> && std::is_signed_v<T>;
template <class T> constexpr u32 width = 8 * sizeof(T);

template <size_t bytes> struct UnsignedOf;
template <> struct UnsignedOf<1> { using type = u8; };
template <> struct UnsignedOf<2> { using type = u16; };
template <> struct UnsignedOf<4> { using type = u32; };
template <> struct UnsignedOf<8> { using type = u64; };
template <class T> using Unsigned = typename UnsignedOf<sizeof(T)>::type;

template <class T, class Bits> INLINE T as(Bits bits)
{
    if constexpr (std::is_integral_v<T>) return T(bits);
    else return std::bit_cast<T>(Unsigned<T>(bits));
}

template <class Register, class T> INLINE void put(Register &to, T value)
{
    if constexpr (std::is_integral_v<T>) to = Register(value);
    else to = Register(std::bit_cast<Unsigned<T>>(value));
}

// 16-bit floating point.  A half is computed with in double, where its sums, products, quotients and roots round
// once more than they should without that ever showing (53 >= 2 * 11 + 2 digits); fma needs the care taken below.

INLINE double wide(f16 v) { return double(float(std::bit_cast<_Float16>(v.bits))); }
INLINE double wide(bf16 v) { return double(std::bit_cast<float>(u32(v.bits) << 16)); }
template <class T> INLINE T wide(T v) { return v; }

INLINE bf16 to_bf16(double v)
{
    if (v != v) return {0x7fff};
    const float nearest = float(v);
    u32 bits = std::bit_cast<u32>(nearest);
    if (double(nearest) != v) {  // round to odd first, so that the second rounding cannot see a tie that is none
        if (std::fabs(double(nearest)) > std::fabs(v)) --bits;
        bits |= 1;
    }
    return {u16((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
INLINE f16 to_f16(double v) { return v != v ? f16{0x7fff} : f16{std::bit_cast<u16>(_Float16(v))}; }

template <class T, class X> INLINE T narrow(X v)
{
    if constexpr (std::is_same_v<T, f16>) return to_f16(double(v));
    else if constexpr (std::is_same_v<T, bf16>) return to_bf16(double(v));
    else return T(v);
}

// .ftz: numbers below the smallest normal one become zeros of their sign, going in and coming out.
template <class T> INLINE T flush(T v)
{
    if constexpr (std::is_floating_point_v<T>)
        return std::fabs(v) < std::numeric_limits<T>::min() ? std::copysign(T(0), v) : v;
    else return v;
}
template <class T> INLINE T saturate(T v)
{
    const auto x = wide(v);
    return narrow<T>(x > 0 ? x < 1 ? x : decltype(x)(1) : decltype(x)(0));  // NaN becomes +0
}

// Integers wrap around; dividing by zero and shifting too far have defined results.

template <class T> INLINE T add(T a, T b)
{
    if constexpr (std::is_integral_v<T>) return T(Unsigned<T>(a) + Unsigned<T>(b));
    else return narrow<T>(wide(a) + wide(b));
}
template <class T> INLINE T sub(T a, T b)
{
    if constexpr (std::is_integral_v<T>) return T(Unsigned<T>(a) - Unsigned<T>(b));
    else return narrow<T>(wide(a) - wide(b));
}
template <class T> INLINE T mul(T a, T b)
{
    if constexpr (std::is_integral_v<T>) return T(u64(a) * u64(b));
    else return narrow<T>(wide(a) * wide(b));
}
template <class T> INLINE T div(T a, T b)
{
    if constexpr (is_signed_integer<T>) return b == 0 ? T(-1) : b == -1 ? sub(T(0), a) : T(a / b);
    else if constexpr (std::is_integral_v<T>) return b == 0 ? T(-1) : T(a / b);
    else return a / b;
}
template <class T> INLINE T rem(T a, T b)
{
    if constexpr (is_signed_integer<T>) if (b == -1) return 0;
    return b == 0 ? a : T(a % b);
}
template <class T> INLINE T mul_lo(T a, T b) { return mul(a, b); }
template <class T> INLINE T mul_hi(T a, T b) { return T((__int128(a) * __int128(b)) >> width<T>); }
template <class T> INLINE auto mul_wide(T a, T b)
{
    using Twice = std::conditional_t<sizeof(T) == 4, std::conditional_t<std::is_signed_v<T>, s64, u64>,
                                     std::conditional_t<std::is_signed_v<T>, s32, u32>>;
    return Twice(Twice(a) * Twice(b));
}
template <class T> INLINE T mad_lo(T a, T b, T c) { return add(mul(a, b), c); }
template <class T> INLINE T mad_hi(T a, T b, T c) { return add(mul_hi(a, b), c); }
template <class T, class C> INLINE C mad_wide(T a, T b, C c) { return add(C(mul_wide(a, b)), c); }

template <class T> INLINE T fma_(T a, T b, T c)
{
    if constexpr (is_half<T>) {
        const double product = wide(a) * wide(b), addend = wide(c);  // the product is exact
        double sum = product + addend;
        const double part = sum - product, lost = (product - (sum - part)) + (addend - part);
        if (std::isfinite(sum) && lost != 0 && !(std::bit_cast<u64>(sum) & 1)) {  // round to odd, as in to_bf16
            const bool away = (lost > 0) == (sum > 0);
            sum = std::bit_cast<double>(std::bit_cast<u64>(sum) + (away ? 1 : -1));
        }
        return narrow<T>(sum);
    }
    else return std::fma(a, b, c);
}

template <class T> INLINE bool is_nan(T a)
{
    if constexpr (is_float<T>) return wide(a) != wide(a);
    else return false;
}
template <class T> INLINE bool negative(T a) { return std::signbit(double(wide(a))); }
template <class T> INLINE T min_(T a, T b)
{
    if constexpr (std::is_integral_v<T>) return a < b ? a : b;
    else return is_nan(a) ? b : is_nan(b) ? a : wide(a) == wide(b) ? (negative(a) ? a : b) : wide(a) < wide(b) ? a : b;
}
template <class T> INLINE T max_(T a, T b)
{
    if constexpr (std::is_integral_v<T>) return a > b ? a : b;
    else return is_nan(a) ? b : is_nan(b) ? a : wide(a) == wide(b) ? (negative(a) ? b : a) : wide(a) > wide(b) ? a : b;
}
template <class T> INLINE T min_nan(T a, T b) { return is_nan(a) ? a : is_nan(b) ? b : min_(a, b); }
template <class T> INLINE T max_nan(T a, T b) { return is_nan(a) ? a : is_nan(b) ? b : max_(a, b); }

template <class T> INLINE T and_(T a, T b) { return a & b; }
template <class T> INLINE T or_(T a, T b) { return a | b; }
template <class T> INLINE T xor_(T a, T b) { return a ^ b; }
template <class T> INLINE T not_(T a)
{
    if constexpr (std::is_same_v<T, bool>) return !a;
    else return T(~a);
}
template <class T> INLINE T shl(T a, u32 n) { return n < width<T> ? T(a << n) : T(0); }
template <class T> INLINE T shr(T a, u32 n) { return n < width<T> ? T(a >> n) : T(a < 0 ? -1 : 0); }
INLINE u32 shf_l(u32 low, u32 high, u32 n) { return u32(((u64(high) << 32 | low) << n) >> 32); }
INLINE u32 shf_r(u32 low, u32 high, u32 n) { return u32((u64(high) << 32 | low) >> n); }

template <class T> INLINE T neg(T a)
{
    if constexpr (std::is_integral_v<T>) return sub(T(0), a);
    else return as<T>(std::bit_cast<Unsigned<T>>(a) ^ (Unsigned<T>(1) << (width<T> - 1)));
}
template <class T> INLINE T abs_(T a)
{
    if constexpr (std::is_integral_v<T>) return a < 0 ? neg(a) : a;
    else return as<T>(std::bit_cast<Unsigned<T>>(a) & ~(Unsigned<T>(1) << (width<T> - 1)));
}
template <class T> INLINE T copysign_(T sign, T magnitude) { return std::copysign(magnitude, sign); }

// The approximate instructions are computed better than on a device: nobody may depend on their last bits.
template <class T> INLINE T rcp(T a) { return T(1) / a; }
template <class T> INLINE T sqrt_(T a) { return std::sqrt(a); }
template <class T> INLINE T rsqrt_(T a) { return T(1 / std::sqrt(double(a))); }
template <class T> INLINE T ex2(T a) { return narrow<T>(std::exp2(wide(a))); }
template <class T> INLINE T lg2(T a) { return std::log2(a); }
template <class T> INLINE T sin_(T a) { return std::sin(a); }
template <class T> INLINE T cos_(T a) { return std::cos(a); }
template <class T> INLINE T tanh_(T a) { return narrow<T>(std::tanh(wide(a))); }

template <class T> INLINE u32 popc(T a) { return u32(std::popcount(a)); }
template <class T> INLINE u32 clz(T a) { return u32(std::countl_zero(a)); }
template <class T> INLINE u32 bfind(T a, bool shift_amount)
{
    auto bits = Unsigned<T>(a);
    if constexpr (std::is_signed_v<T>) bits = a < 0 ? ~bits : bits;
    if (bits == 0) return ~0u;
    return shift_amount ? u32(std::countl_zero(bits)) : width<T> - 1 - u32(std::countl_zero(bits));
}
template <class T> INLINE T brev(T a)
{
    T reversed = 0;
    for (u32 i = 0; i < width<T>; ++i) reversed |= (a >> i & 1) << (width<T> - 1 - i);
    return reversed;
}
template <class T> INLINE T bfi(T a, T b, u32 position, u32 length)
{
    position &= 255;
    length &= 255;
    if (position >= width<T>) return b;
    const T mask = (length < width<T> ? (T(1) << length) - 1 : ~T(0)) << position;
    return (b & ~mask) | ((a << position) & mask);
}
template <class T> INLINE T bfe(T a, u32 position, u32 length)
{
    position &= 255;
    length &= 255;
    if (length == 0) return 0;
    const u32 top = position + length - 1 < width<T> - 1 ? position + length - 1 : width<T> - 1;
    const bool sign = is_signed_integer<T> && (Unsigned<T>(a) >> top & 1);
    Unsigned<T> field = position < width<T> ? Unsigned<T>(a) >> position : 0;
    if (length < width<T>) field &= (Unsigned<T>(1) << length) - 1;
    const u32 kept = top + 1 > position ? top + 1 - position : 0;
    if (sign && kept < width<T>) field |= ~Unsigned<T>(0) << kept;
    return T(field);
}
INLINE u32 lop3(u32 a, u32 b, u32 c, u32 table)
{
    u32 result = 0;
    for (u32 i = 0; i < 8; ++i)
        if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    return result;
}
INLINE u32 prmt(u32 a, u32 b, u32 selector)
{
    const u64 bytes = u64(b) << 32 | a;
    u32 result = 0;
    for (u32 i = 0; i < 4; ++i) {
        const u32 choice = selector >> 4 * i & 15;
        u8 byte = u8(bytes >> 8 * (choice & 7));
        if (choice & 8) byte = byte & 0x80 ? 0xff : 0;
        result |= u32(byte) << 8 * i;
    }
    return result;
}

// Comparisons.  Ordered ones are false, unordered ones true when an operand is NaN.
template <class T> INLINE bool lt(T a, T b) { return wide(a) < wide(b); }
template <class T> INLINE bool le(T a, T b) { return wide(a) <= wide(b); }
template <class T> INLINE bool gt(T a, T b) { return wide(a) > wide(b); }
template <class T> INLINE bool ge(T a, T b) { return wide(a) >= wide(b); }
template <class T> INLINE bool eq(T a, T b) { return wide(a) == wide(b); }
template <class T> INLINE bool ne(T a, T b) { return is_float<T> ? lt(a, b) || gt(a, b) : !eq(a, b); }
template <class T> INLINE bool ltu(T a, T b) { return !ge(a, b); }
template <class T> INLINE bool leu(T a, T b) { return !gt(a, b); }
template <class T> INLINE bool gtu(T a, T b) { return !le(a, b); }
template <class T> INLINE bool geu(T a, T b) { return !lt(a, b); }
template <class T> INLINE bool equ(T a, T b) { return !ne(a, b); }
template <class T> INLINE bool neu(T a, T b) { return !eq(a, b); }
template <class T> INLINE bool num(T a, T b) { return !is_nan(a) && !is_nan(b); }
template <class T> INLINE bool nan_(T a, T b) { return !num(a, b); }

// Conversions.  To an integer: rounded as asked, clamped to its range, NaN to 0.
enum class Round { none, nearest, down, up, zero };
template <class To, Round round, class From> INLINE To cvt(From from)
{
    auto v = wide(from);
    if constexpr (!is_float<From>) return narrow<To>(v);
    else {
        if constexpr (round == Round::nearest) v = std::nearbyint(v);
        if constexpr (round == Round::down) v = std::floor(v);
        if constexpr (round == Round::up) v = std::ceil(v);
        if constexpr (round == Round::zero) v = std::trunc(v);
        if constexpr (std::is_integral_v<To>) {
            using Limits = std::numeric_limits<To>;
            using V = decltype(v);
            return v != v ? To(0) : v <= V(Limits::min()) ? Limits::min() : v >= V(Limits::max()) ? Limits::max() : To(v);
        }
        else return narrow<To>(v);
    }
}
// cvt.sat between integers: clamped to the range of the target.
template <class To, class From> INLINE To clamp(From v)
{
    using Limits = std::numeric_limits<To>;
    const __int128 wide_value = v;
    return wide_value < Limits::min() ? Limits::min() : wide_value > Limits::max() ? Limits::max() : To(v);
}
