// Formulas: a few marks of TeX to HTML.  x_t  x_{t-1}  √{1-ᾱ_t}  \frac{a}{b}

const OPERATORS = { "-": "−", "*": " · ", "=": " = ", "+": " + ", "<": " ← " };

/** "x_s = √{ᾱ_s} x̂_0" -> HTML. A word of Latin letters stays upright; a single one is italic. */
export function formula(text) {
  const { html } = group([...text.normalize("NFC")], 0);
  return html;
}

function group(letters, from) {
  let html = "";
  let i = from;
  while (i < letters.length && letters[i] !== "}") {
    const part = atom(letters, i);
    html += part.html;
    i = part.next;
  }
  return { html, next: i + 1 };
}

function atom(letters, i) {
  const letter = letters[i];
  if (letter === "{") return group(letters, i + 1);
  if (letter === "_" || letter === "^") {
    const { html, next } = atom(letters, i + 1);
    const tag = letter === "_" ? "sub" : "sup";
    return { html: `<${tag}>${html}</${tag}>`, next };
  }
  if (letter === "√") {
    const { html, next } = atom(letters, i + 1);
    return { html: `<span class="root">√<span>${html}</span></span>`, next };
  }
  if (letter === "\\") return fraction(letters, i + "\\frac".length);
  if (letter in OPERATORS) return { html: OPERATORS[letter], next: i + 1 };
  return word(letters, i);
}

function fraction(letters, i) {
  const above = atom(letters, i);
  const below = atom(letters, above.next);
  const html = `<span class="fraction"><span>${above.html}</span><span>${below.html}</span></span>`;
  return { html, next: below.next };
}

function word(letters, from) {
  let i = from + 1;
  while (/\p{M}/u.test(letters[i] ?? "")) i++; // a hat or a bar above the letter
  if (!/\p{L}/u.test(letters[from])) return { html: letters.slice(from, i).join(""), next: i };
  while (/[a-z]/.test(letters[from]) && /[a-z]/.test(letters[i] ?? "")) i++;
  const text = letters.slice(from, i).join("");
  return { html: /^[a-z]{2,}$/.test(text) ? text : `<i>${text}</i>`, next: i };
}

/** Three figures, and a real minus sign. */
export function number(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  const [digits, exponent] = size.toExponential(2).split("e");
  const text =
    size < 0.001 || size >= 10000
      ? `${digits}·10<sup>${exponent.replace("-", "−").replace("+", "")}</sup>`
      : size.toFixed(size < 10 ? 3 : 1);
  return (value < 0 ? "−" : "") + text;
}

/** For the right of an operator: negative numbers in brackets. */
export const operand = (value) => (value < 0 ? `(${number(value)})` : number(value));
