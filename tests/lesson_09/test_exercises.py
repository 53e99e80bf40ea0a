"""Lesson 9's exercises: blanks fail, the README's answers pass, tempting wrong answers fail."""

from exercises import assert_exercises_hold

COSINE = """
def cosine_alpha_bar(T, s=0.008):
    t = torch.arange(T + 1, dtype=torch.float64)
    f = torch.cos(ANGLE * math.pi / 2) ** POWER
    return RESULT
"""
VARIANCE = """
def best_variance(alpha_bar, t, s):
    beta = 1 - alpha_bar[t] / alpha_bar[t - 1]
    beta_tilde = (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t]) * beta
    w = alpha_bar[W].sqrt() * beta / (1 - alpha_bar[t])
    return beta_tilde + TERM
"""
LEARNED = """
def learned_log_var(v, log_beta, log_beta_tilde):
    return LINE
"""
HYBRID = """
def hybrid_loss(process, out, x0, xt, t, eps):
    eps_hat, v = out.chunk(2, dim=1)
    simple = ((eps - eps_hat) ** 2).flatten(1).mean(1)
    p = process.p_mean_variance(OUT, xt, t, clip_x0=False)
    return simple + process.vlb_weight * FACTOR * process.term_bits(p, x0, xt, t)
"""
PROBABILITIES = """
def best_probabilities(terms):
    return LINE
"""
WEIGHT = """
def loss_weight(p, t):
    return LINE
"""
STRIDED = """
def strided_betas(alpha_bar, times):
    return LINE
"""


def cosine(angle: str, power: int, result: str) -> str:
    return COSINE.replace("ANGLE", angle).replace("POWER", str(power)).replace("RESULT", result)


def variance(w: str, term: str) -> str:
    return VARIANCE.replace("W]", f"{w}]").replace("TERM", term)


def hybrid(out: str, factor: str) -> str:
    return HYBRID.replace("OUT", out).replace("FACTOR", factor)


def line(code: str, text: str) -> str:
    return code.replace("LINE", text)


CAT = "torch.cat([eps_hat.detach(), v], 1)"
F = "(v + 1) / 2"
WRONG = {
    "check_1_cosine_schedule": [
        cosine("t / T", 2, "f / f[0]"),  # without the offset s
        cosine("(t / T + s) / (1 + s)", 2, "f"),  # ᾱ_0 is not 1
        cosine("(t / T + s) / (1 + s)", 1, "f / f[0]"),
        cosine("(t / T + s) / (1 + s)", 2, "(f / f[0])[1:]"),
        "NUM_ABOVE_HALF = 500",
        "NUM_CUT = 0",
    ],
    "check_2_best_variance": [
        variance(
            "t", "w**2 * s**2 * (1 - alpha_bar[t]) / (alpha_bar[t] * s**2 + 1 - alpha_bar[t])"
        ),
        variance("t - 1", "w**2 * s**2"),  # as if x_t said nothing about x_0
        variance("t - 1", "0 * s"),  # β̃ whatever the data
        variance(
            "t - 1", "w * s**2 * (1 - alpha_bar[t]) / (alpha_bar[t] * s**2 + 1 - alpha_bar[t])"
        ),
    ],
    "check_3_learned_variance": [
        line(LEARNED, "v"),  # the raw log variance
        line(LEARNED, "v * log_beta + (1 - v) * log_beta_tilde"),  # the paper's v
        line(LEARNED, f"(1 - {F}) * log_beta + {F} * log_beta_tilde"),
        line(LEARNED, f"({F} * log_beta.exp() + (1 - {F}) * log_beta_tilde.exp()).log()"),
        line(LEARNED, f"log_beta_tilde + ({F}).clamp(0, 1) * (log_beta - log_beta_tilde)"),
    ],
    "check_4_hybrid_loss": [
        hybrid(CAT, "1"),  # λ times one term
        hybrid("out", "process.num_timesteps"),  # no stop-gradient
        hybrid("out.detach()", "process.num_timesteps"),  # v learns nothing
        hybrid("torch.cat([eps_hat, v.detach()], 1)", "process.num_timesteps"),
    ],
    "check_5_importance_sampling": [
        line(PROBABILITIES, "terms.mean(1) / terms.mean(1).sum()"),
        line(PROBABILITIES, "(terms**2).mean(1) / (terms**2).mean(1).sum()"),
        line(PROBABILITIES, "(terms**2).mean(1).sqrt()"),
        line(WEIGHT, "p[t - 1]"),
        line(WEIGHT, "1 / p[t - 1]"),
        line(WEIGHT, "1 / (len(p) * p[t])"),
        "FACTOR = 1000",
        "FACTOR = 5.42",  # its root
    ],
    "check_6_strided_betas": [
        line(STRIDED, "(1 - alpha_bar[1:] / alpha_bar[:-1])[times - 1]"),  # those of the long one
        line(STRIDED, "1 - alpha_bar[times]"),
        line(STRIDED, "1 - alpha_bar[times][1:] / alpha_bar[times][:-1]"),  # S - 1 of them
    ],
}


def test_exercises_hold():
    assert_exercises_hold("lesson_09", WRONG)
