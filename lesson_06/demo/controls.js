// The settings of a panel: a form, its values, and what it says beside each slider.

const LARGEST_SEED = 2 ** 32 - 1;

export class Controls {
  /** changed is called after each change. */
  constructor(form, changed) {
    this.form = form;
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("input", () => {
      this.report();
      changed();
    });
    for (const button of form.querySelectorAll("[data-do=seed]")) {
      button.addEventListener("click", () => {
        for (const input of form.querySelectorAll("[type=number]")) {
          input.value = Math.floor(Math.random() * 10000);
        }
        changed();
      });
    }
    this.report();
  }

  /** Sets fields by name. */
  set(values) {
    for (const [name, value] of Object.entries(values)) this.form.elements[name].value = value;
    this.report();
  }

  /** Shows each slider's value in the output of its label. */
  report() {
    for (const slider of this.form.querySelectorAll("[type=range]")) {
      slider.labels[0].querySelector("output").textContent = slider.value;
    }
  }

  /** name -> number, text or true/false; a digit is a number, or null for none. */
  get values() {
    const values = Object.fromEntries(new FormData(this.form));
    for (const input of this.form.elements) {
      if (input.type === "range") values[input.name] = Number(input.value);
      if (input.type === "checkbox") values[input.name] = input.checked;
      if (input.type === "number") values[input.name] = seedOf(input);
    }
    if (values.label !== "right") {
      values.label = values.label === "none" ? null : Number(values.label);
    }
    return values;
  }
}

/** A whole number that PyTorch takes for a seed; 0 where the field has none. */
function seedOf(input) {
  const seed = Math.floor(Number(input.value));
  return seed >= 0 && seed <= LARGEST_SEED ? seed : 0;
}

/** Buttons by what they do: data-do. */
export function onClick(panel, actions) {
  for (const [name, action] of Object.entries(actions)) {
    panel.querySelector(`[data-do=${name}]`).addEventListener("click", action);
  }
}
