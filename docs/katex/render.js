// Draws what pymdownx.arithmatex leaves: \(...\) in a span, \[...\] in a div.
document$.subscribe(({ body }) => {
  for (const formula of body.querySelectorAll(".arithmatex")) {
    const text = formula.textContent.slice(2, -2);
    katex.render(text, formula, { displayMode: formula.tagName === "DIV", throwOnError: false });
  }
});
