"""Lesson 2's exercises: blanks fail, the README's answers pass, and tempting errors fail."""

import pytest
from exercises import assert_exercises_hold

REVERSE = """
def reverse_gaussian(out, xt, beta_t, T):
    mu, b = out.chunk(2, dim=1)
    mean = math.sqrt(1 - beta_t) * xt + math.sqrt(beta_t) * mu
    log_odds = math.log(beta_t / (1 - beta_t))
    return mean, torch.nn.functional.logsigmoid(b / math.sqrt(T) + log_odds)
"""
CONSTANTS = """
def constants(beta):
    entropy = lambda v: 0.5 * math.log2(2 * math.pi * math.e * float(v))
    bar = (1 - beta).cumprod(0)
    return entropy(1 - bar[-1]), entropy(beta[0]), entropy(1)
"""
SAMPLE = """
def sample(process, model, x_T):
    xt = x_T
    for t in range(process.num_timesteps, 1, -1):
        t_batch = torch.full((len(xt),), t)
        mean, log_var = process.p_mean_variance(model(xt, t_batch), xt, t_batch)
        xt = mean + torch.exp(0.5 * log_var) * torch.randn_like(xt)
    return xt
"""


def changed(code: str, old: str, new: str) -> str:
    assert old in code
    return code.replace(old, new)


WRONG = {
    "check_1_straight_line": ["LAST_T = 500", "LAST_T = 259", "HALF_OF_TEN = 6"],
    "check_2_reverse_gaussian": [
        changed(REVERSE, "b / math.sqrt(T)", "b"),
        changed(REVERSE, "math.sqrt(beta_t) * mu", "beta_t * mu"),
        changed(REVERSE, "math.sqrt(1 - beta_t)", "(1 - beta_t)"),
        changed(REVERSE, "torch.nn.functional.logsigmoid", "torch.sigmoid"),
        changed(REVERSE, "math.log(beta_t / (1 - beta_t))", "math.log(beta_t)"),
    ],
    "check_3_constants": [
        changed(CONSTANTS, "entropy(beta[0])", "entropy(1 - beta[0])"),
        changed(CONSTANTS, "entropy(1 - bar[-1])", "entropy(1)"),
        changed(CONSTANTS, "math.log2", "math.log"),
        "GAIN = 1",
        "ZERO_NETWORK = 'a'",
    ],
    "check_4_sampling": [
        changed(SAMPLE, ", 1, -1", ", 0, -1"),
        changed(SAMPLE, "0.5 * log_var", "log_var"),
        changed(SAMPLE, "torch.randn_like(xt)", "torch.randn_like(xt) * (t > 2)"),
    ],
    "check_5_evidence": [
        "def noise_var_at(noise_var, t, T): return noise_var * (T - t) / T",
        "def noise_var_at(noise_var, t, T): return noise_var",
        "MEAN = 0.5",
        "VARIANCE = 0.5",
        "FACTOR = 0.5",
    ],
    "check_6_dequantisation": [
        "def first_noise(beta_1, std=78.57): return std * beta_1",
        "def cost(beta_1, std=78.57): return 0.5 * math.log2(1 + 1 / (std**2 * beta_1))",
        "CHANGE = 'a'",
        "CHANGE = 'b'",
    ],
}


def test_exercises_hold():
    assert_exercises_hold("lesson_02", WRONG)


def test_the_unchanged_code_is_right():
    """What the wrong answers above differ from."""
    from exercises import answers, verdicts

    right = verdicts("lesson_02", *answers("lesson_02"), REVERSE, CONSTANTS, SAMPLE)
    assert set(right.values()) == {"right"}
    with pytest.raises(AssertionError):
        changed(SAMPLE, "not in it", "")
