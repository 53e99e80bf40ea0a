"""Lesson 5's exercises: blanks fail, the README's answers pass, tempting wrong answers fail."""

from exercises import assert_exercises_hold

LOSS = """
def training_loss(process, model, x0):
    t = {t}
    eps = {eps}
    out = model(process.q_sample(x0, t, eps), t)
    return ((({target}) - out) ** 2).flatten(1).mean(1)
"""
STEP = """
def p_sample(beta, alpha_bar, model, xt, t, z):
    eps_hat = model(xt, torch.full((len(xt),), t))
    mean = (xt - beta[t] / {noise} * eps_hat) / {signal}
    return mean + {deviation} * z
"""
TIMES = "torch.randint(1, process.num_timesteps + 1, (len(x0),))"
NOISE, SIGNAL = "(1 - alpha_bar[t]).sqrt()", "(1 - beta[t]).sqrt()"
DEVIATION = "(beta[t].sqrt() if t > 1 else 0)"


def loss(t: str = TIMES, eps: str = "torch.randn_like(x0)", target: str = "eps") -> str:
    return LOSS.format(t=t, eps=eps, target=target)


def step(noise: str = NOISE, signal: str = SIGNAL, deviation: str = DEVIATION) -> str:
    return STEP.format(noise=noise, signal=signal, deviation=deviation)


def q_sample(expression: str) -> str:
    return f"def q_sample(alpha_bar, x0, t, eps):\n    a = alpha_bar[t]\n    return {expression}\n"


WRONG = {
    "check_1_half": ["HALF = 500", "HALF = 258", "HALF = 0.5"],
    "check_2_q_sample": [
        q_sample("a.view(-1, 1, 1, 1) * x0 + (1 - a).view(-1, 1, 1, 1) * eps"),
        q_sample("a[0].sqrt() * x0 + (1 - a[0]).sqrt() * eps"),
        q_sample("(1 - a).sqrt().view(-1, 1, 1, 1) * x0 + a.sqrt().view(-1, 1, 1, 1) * eps"),
    ],
    "check_3_training_loss": [
        loss(t="torch.randint(0, process.num_timesteps, (len(x0),))"),
        loss(t="torch.randint(1, process.num_timesteps, (len(x0),))"),
        loss(t="torch.randint(1, process.num_timesteps + 1, (1,)).expand(len(x0))"),
        loss(eps="torch.rand_like(x0)"),
        loss(target="x0"),
        loss(target="-eps"),
    ],
    "check_4_p_sample": [
        step(deviation="beta[t].sqrt()"),
        step(deviation="(beta[t] if t > 1 else 0)"),
        step(deviation="0"),
        step(noise="(1 - alpha_bar[t])"),
        step(signal="1"),
        step(signal="alpha_bar[t].sqrt()"),
    ],
    "check_5_weight_of_x0": [
        f"def weight_of_x0(alpha_bar):\n    return {wrong}\n"
        for wrong in ("(1 - alpha_bar) / alpha_bar", "1 / (1 - alpha_bar)", "alpha_bar", "1")
    ],
    "check_6_score": [
        f"def score(alpha_bar, eps_hat):\n    return {wrong}\n"
        for wrong in ("-eps_hat", "eps_hat / (1 - alpha_bar).sqrt()", "-eps_hat / (1 - alpha_bar)")
    ],
}


def test_exercises():
    assert_exercises_hold("lesson_05", WRONG)
