"""The exercises of lesson 6: blanks fail, the README's answers pass, tempting wrong ones fail."""

import subprocess
import sys

from exercises import answers, assert_exercises_hold, verdicts
from helpers import ROOT

STEP = """
def ddim_step(xt, eps_hat, alpha_bar_t, alpha_bar_s, eta, z):
    x0_hat = (xt - (1 - alpha_bar_t) ** 0.5 * eps_hat) / alpha_bar_t**0.5
    variance = (1 - alpha_bar_s) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_s)
    sigma = {sigma}
    return alpha_bar_s**0.5 * x0_hat + max({rest}, 0) ** 0.5 * eps_hat + sigma * z
"""
RIGHT_SIGMA, RIGHT_REST = "eta * variance**0.5", "1 - alpha_bar_s - sigma**2"
ENCODE = """
def encode_step(model, process, xs, s, t):
    alpha_bar_s, alpha_bar_t = process.alpha_bar[[s, t]].tolist()
    eps_hat = model(xs, torch.full((len(xs),), {time}))
    x0_hat = (xs - (1 - alpha_bar_{x}) ** 0.5 * eps_hat) / alpha_bar_{x}**0.5
    return alpha_bar_t**0.5 * x0_hat + (1 - alpha_bar_t) ** 0.5 * eps_hat
"""
WRONG = {
    "check_1_times": [
        "evaluations = 300",
        "evaluations = 333",
        'starts_at_T = "uniform"',
        'starts_at_T = "quadratic"',
    ],
    "check_2_halfway": [
        "deviation_on_the_line = 0.5",
        "deviation_on_the_line = 1",
        "deviation_on_the_arc = 0.5**0.5",
    ],
    "check_3_uniform_times": [
        "def uniform_times(T, S):\n    return list(range(1, T + 1, T // S))",
        "def uniform_times(T, S):\n    return [i * (T // S) for i in range(S)]",
        "def uniform_times(T, S):\n    return torch.linspace(1, T, S).round().int().tolist()",
        "def uniform_times(T, S):\n    return ddim.ddim_timesteps(T, S)[::-1]",
    ],
    "check_4_ddim_step": [
        STEP.format(sigma=RIGHT_SIGMA, rest="1 - alpha_bar_s"),
        STEP.format(sigma=RIGHT_SIGMA, rest="1 - alpha_bar_s - sigma"),
        STEP.format(sigma="eta * variance", rest=RIGHT_REST),
        STEP.format(sigma="eta * (1 - alpha_bar_t / alpha_bar_s) ** 0.5", rest=RIGHT_REST),
        STEP.format(sigma="0 * eta", rest=RIGHT_REST),
    ],
    "check_5_encode_step": [
        ENCODE.format(time="t", x="s"),
        ENCODE.format(time="s", x="s"),
        ENCODE.format(time="max(s, 1)", x="t"),
    ],
    "check_6_share_left": [
        "def share_left(alpha_bar_t, eta):\n    return 1.0",
        "def share_left(alpha_bar_t, eta):\n    return alpha_bar_t**0.5",
        "def share_left(alpha_bar_t, eta):\n    return alpha_bar_t if eta else 1.0",
        "def share_left(alpha_bar_t, eta):\n    return 0.0 if eta else 1.0",
    ],
}


def test_blanks_fail_answers_pass_and_wrong_answers_fail():
    assert_exercises_hold("lesson_06", WRONG)
    right = STEP.format(sigma=RIGHT_SIGMA, rest=RIGHT_REST)
    encode = ENCODE.format(time="max(s, 1)", x="s")
    other = "def share_left(alpha_bar_t, eta):\n    return math.sqrt(alpha_bar_t) ** eta"
    found = verdicts("lesson_06", *answers("lesson_06"), right, encode, other)
    assert set(found.values()) == {"right"}, found


def test_the_file_runs_in_the_folder_of_the_lesson():
    command = [sys.executable, "exercises.py", "4"]
    result = subprocess.run(command, cwd=ROOT / "lesson_06", capture_output=True, text=True)
    assert result.stdout.startswith("4 ddim_step: not yet: fill in the ...")
    assert result.returncode == 1
