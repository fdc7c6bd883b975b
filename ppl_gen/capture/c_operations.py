"""Operations of torch on single numbers, as expressions of C; all in double precision, booleans as 0 and 1."""

from __future__ import annotations

__all__ = ["EXPRESSIONS", "PRELUDE"]

#: By name, without the underscore of those in place; the arguments go into the braces, each a name or a number.
EXPRESSIONS: dict[str, str] = {
    "aten::add.Tensor": "{0} + {1}",
    "aten::add.Scalar": "{0} + {1}",
    "aten::sub.Tensor": "{0} - {1}",
    "aten::sub.Scalar": "{0} - {1}",
    "aten::rsub.Scalar": "{1} - {0}",
    "aten::mul.Tensor": "{0} * {1}",
    "aten::mul.Scalar": "{0} * {1}",
    "aten::div.Tensor": "(double){0} / {1}",
    "aten::div.Scalar": "(double){0} / {1}",
    "aten::neg": "-{0}",
    "aten::reciprocal": "1.0 / {0}",
    "aten::clone": "{0}",
    "aten::contiguous": "{0}",
    "aten::_unsafe_view": "{0}",
    "aten::reshape": "{0}",
    "aten::_to_copy": "{0}",
    "aten::copy": "{1}",
    "aten::lt.Scalar": "{0} < {1}",
    "aten::lt.Tensor": "{0} < {1}",
    "aten::le.Scalar": "{0} <= {1}",
    "aten::le.Tensor": "{0} <= {1}",
    "aten::gt.Scalar": "{0} > {1}",
    "aten::gt.Tensor": "{0} > {1}",
    "aten::ge.Scalar": "{0} >= {1}",
    "aten::ge.Tensor": "{0} >= {1}",
    "aten::eq.Scalar": "{0} == {1}",
    "aten::eq.Tensor": "{0} == {1}",
    "aten::ne.Scalar": "{0} != {1}",
    "aten::ne.Tensor": "{0} != {1}",
    "aten::logical_and": "{0} && {1}",
    "aten::logical_or": "{0} || {1}",
    "aten::logical_not": "!{0}",
    "aten::bitwise_and.Tensor": "{0} & {1}",
    "aten::bitwise_or.Tensor": "{0} | {1}",
    "aten::bitwise_not": "!{0}",  # of booleans
    "aten::isnan": "{0} != {0}",
    "aten::where.self": "{0} ? {1} : {2}",
    "aten::masked_fill.Scalar": "{1} ? {2} : {0}",
    "aten::masked_fill.Tensor": "{1} ? {2} : {0}",
    "aten::maximum": "{0} > {1} || {0} != {0} ? {0} : {1}",
    "aten::minimum": "{0} < {1} || {0} != {0} ? {0} : {1}",
    "aten::clamp_min": "{0} < {1} ? {1} : {0}",
    "aten::clamp_max": "{0} > {1} ? {1} : {0}",
    "aten::relu": "{0} < 0.0 ? 0.0 : {0}",
    "aten::threshold_backward": "{1} <= {2} ? 0.0 : {0}",
    "aten::abs": "fabs({0})",
    "aten::sgn": "({0} > 0.0) - ({0} < 0.0)",
    "aten::sign": "({0} > 0.0) - ({0} < 0.0)",
    "aten::exp": "exp({0})",
    "aten::log": "log({0})",
    "aten::log1p": "ppl_log1p({0})",
    "aten::expm1": "expm1({0})",
    "aten::exp2": "exp2({0})",
    "aten::log2": "log2({0})",
    "aten::log10": "log10({0})",
    "aten::logaddexp": "ppl_logaddexp({0}, {1})",
    "aten::sqrt": "sqrt({0})",
    "aten::rsqrt": "1.0 / sqrt({0})",
    "aten::sin": "sin({0})",
    "aten::cos": "cos({0})",
    "aten::tan": "tan({0})",
    "aten::sinh": "sinh({0})",
    "aten::cosh": "cosh({0})",
    "aten::tanh": "tanh({0})",
    "aten::asin": "asin({0})",
    "aten::acos": "acos({0})",
    "aten::atan": "atan({0})",
    "aten::atan2": "atan2({0}, {1})",
    "aten::hypot": "hypot({0}, {1})",
    "aten::floor": "floor({0})",
    "aten::ceil": "ceil({0})",
    "aten::trunc": "trunc({0})",
    "aten::erf": "erf({0})",
    "aten::erfc": "erfc({0})",
    "aten::lgamma": "ppl_lgamma({0})",
    "aten::digamma": "ppl_digamma({0})",
    "aten::pow.Tensor_Scalar": "pow({0}, {1})",
    "aten::pow.Tensor_Tensor": "pow({0}, {1})",
    "aten::pow.Scalar": "pow({0}, {1})",
    "aten::xlogy.Tensor": "{0} == 0.0 && {1} == {1} ? 0.0 : {0} * log({1})",
    "aten::sigmoid": "1.0 / (1.0 + exp(-{0}))",
    "aten::sigmoid_backward": "{0} * (1.0 - {1}) * {1}",
    "aten::tanh_backward": "{0} * (1.0 - {1} * {1})",
    "aten::log_sigmoid_forward": "({0} < 0.0 ? {0} : 0.0) - ppl_log1p(exp(-fabs({0})))",
    "aten::log_sigmoid_backward": "{0} / (1.0 + exp({1}))",
    "aten::softplus": "{0} * {1} > {2} ? {0} : ppl_log1p(exp({0} * {1})) / {1}",
    "aten::softplus_backward": "{1} * {2} > {3} ? {0} : {0} / (1.0 + exp(-{1} * {2}))",
}

#: Vector forms of exp and log are in glibc; the compiler takes them in loops once it is told of them.
PRELUDE = r"""
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
__attribute__((simd("notinbranch"))) double exp(double);
__attribute__((simd("notinbranch"))) double log(double);
#endif
#include <math.h>

double lgamma_r(double, int *);

/* By the logarithm that loops can take, and what rounding 1 + x has lost of x. */
static inline double ppl_log1p(double x) {
  const double u = 1.0 + x, all = log(u);
  return u > 0.0 && u < INFINITY ? all - ((u - 1.0) - x) / u : all;
}

static inline double ppl_logaddexp(double a, double b) {
  const double top = a > b || a != a ? a : b;
  return isfinite(top) ? top + ppl_log1p(exp(-fabs(a - b))) : top;
}

static double ppl_lgamma(double x) {
  int sign;
  return lgamma_r(x, &sign);
}

/* By recurrence to x >= 10 and the asymptotic series there; by reflection below zero. */
static double ppl_digamma(double x) {
  double below = 0.0;
  if (x == 0.0) return copysign(INFINITY, -x);
  if (x < 0.0) {
    if (x == floor(x)) return NAN;
    below = -M_PI / tan(M_PI * x);
    x = 1.0 - x;
  }
  for (; x < 10.0; x += 1.0) below -= 1.0 / x;
  const double y = 1.0 / (x * x);
  const double series = y * (1.0 / 12 - y * (1.0 / 120 - y * (1.0 / 252 - y * (1.0 / 240 - y * (1.0 / 132 - y *
                        (691.0 / 32760 - y / 12))))));
  return below + log(x) - 0.5 / x - series;
}
"""
