"""The exercises of lesson 5 with labels and with prompts."""

from exercises import assert_exercises_hold

CLASSES = {
    "check_1_no_label_dropped": [
        "share_of_full_batches = 0.1**64",
        "share_of_full_batches = 0.9",
        "share_of_full_batches = 1 - 0.9**64",
    ],
    "check_2_drop": [
        # one coin for the batch
        "def drop(condition, null, probability):\n"
        "    return null if torch.rand(()) < probability else condition",
        # one coin a token
        "def drop(condition, null, probability):\n"
        "    return torch.where(torch.rand(condition.shape) < probability, null, condition)",
        # the other nine tenths
        "def drop(condition, null, probability):\n"
        "    keep = torch.rand(len(condition)) < probability\n"
        "    return torch.where(keep.view(-1, *[1] * (condition.ndim - 1)), condition, null)",
    ],
    "check_3_guided": [
        "guided = lambda eps_null, eps_cond, s: s * eps_cond",
        "guided = lambda eps_null, eps_cond, s: eps_cond + s * (eps_cond - eps_null)",
        "guided = lambda eps_null, eps_cond, s: eps_cond + s * (eps_null - eps_cond)",
    ],
    "check_4_density": [
        "density = lambda c, s: (s * c, 1)",
        "density = lambda c, s: (c, 1 / s)",
        "density = lambda c, s: (s * c / (1 + s), 1 / (1 + s))",
    ],
    "check_5_classify": [
        # new noise for each label
        "def classify(process, model, x0, num_classes):\n"
        "    t, losses = torch.full((len(x0),), 200), []\n"
        "    for c in range(num_classes):\n"
        "        eps = torch.randn_like(x0)\n"
        "        out = model(process.q_sample(x0, t, eps), t, torch.full_like(t, c))\n"
        "        losses.append(((out - eps) ** 2).flatten(1).mean(1))\n"
        "    return torch.stack(losses).argmin(0)",
        # the mean over the batch: one label for all
        "def classify(process, model, x0, num_classes):\n"
        "    t, eps = torch.full((len(x0),), 200), torch.randn_like(x0)\n"
        "    xt = process.q_sample(x0, t, eps)\n"
        "    losses = [(model(xt, t, torch.full_like(t, c)) - eps).square().mean()\n"
        "              for c in range(num_classes)]\n"
        "    return torch.stack(losses).argmin().expand(len(x0))",
    ],
}
PROMPTS = {
    "check_1_tokens": [
        "tokens_of_a_7 = [97, 32, 55]",
        "tokens_of_a_7 = [65, 32, 32, 55, 256, 256, 256, 256]",
        "tokens_of_a_7 = [97, 32, 55, 0, 0, 0, 0, 0]",
    ],
    "check_2_mean": [
        "mean = lambda sequence, mask: sequence.mean(1)",
        "mean = lambda sequence, mask: (sequence * mask[..., None]).mean(1)",
    ],
    "check_3_cross_attention": [
        # masked after the softmax: the weights no longer add up to 1
        "def cross_attention(q, k, v, mask):\n"
        "    weights = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1)\n"
        "    return (weights * mask[:, None]) @ v",
        # softmax over the pixels
        "def cross_attention(q, k, v, mask):\n"
        "    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~mask[:, None], -1e9)\n"
        "    return torch.softmax(scores, dim=1) @ v",
        # a score of 0 is no mask
        "def cross_attention(q, k, v, mask):\n"
        "    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~mask[:, None], 0.0)\n"
        "    return torch.softmax(scores, dim=-1) @ v",
        # without the root of d
        "def cross_attention(q, k, v, mask):\n"
        "    scores = (q @ k.mT).masked_fill(~mask[:, None], -torch.inf)\n"
        "    return torch.softmax(scores, dim=-1) @ v",
    ],
    "check_4_one_token": [
        "without_gradient = set()",
        'without_gradient = {"q"}',
        'without_gradient = {"q", "k", "v"}',
    ],
    "check_5_guided": [
        # a text in place of the null prompt
        "def guided(model, xt, t, tokens, s):\n"
        "    null = tokenize(['null'] * len(tokens) + ['a handwritten 7'])[:-1]\n"
        "    both = model.encode(torch.cat([tokens, null]))\n"
        "    cond, null = model(torch.cat([xt, xt]), torch.cat([t, t]), both).chunk(2)\n"
        "    return null + s * (cond - null)",
        # two calls
        "def guided(model, xt, t, tokens, s):\n"
        "    cond = model(xt, t, model.encode(tokens))\n"
        "    null = model(xt, t, model.encode(null_prompt(tokens)))\n"
        "    return null + s * (cond - null)",
        # the paper's w = s - 1 taken for s
        "def guided(model, xt, t, tokens, s):\n"
        "    both = model.encode(torch.cat([tokens, null_prompt(tokens)]))\n"
        "    cond, null = model(torch.cat([xt, xt]), torch.cat([t, t]), both).chunk(2)\n"
        "    return (1 + s) * cond - s * null",
    ],
}


def test_exercises_with_classes():
    assert_exercises_hold("lesson_05/class_conditional", CLASSES)


def test_exercises_with_prompts():
    assert_exercises_hold("lesson_05/text_to_image", PROMPTS)
