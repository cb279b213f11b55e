// Shows the value under the cursor, on both pictures of app.py's page.
() => {
  const tip = document.createElement("output");
  tip.id = "tip";
  document.body.append(tip);
  let codes = new Uint16Array();  // planes, height, width: see codes() in visit.py

  window.takeCodes = async file => {
    codes = new Uint16Array(file ? await (await fetch(file.url)).arrayBuffer() : 0);
  };

  const pixelUnder = event => {  // of the picture as shown -> [index, pixels], or nothing
    for (const image of document.querySelectorAll("#shown img, #marked img")) {
      const box = image.getBoundingClientRect();
      const width = image.naturalWidth, height = image.naturalHeight;
      const scale = Math.min(box.width / width, box.height / height);  // object-fit: contain
      const x = Math.floor((event.clientX - box.left - (box.width - width * scale) / 2) / scale);
      const y = Math.floor((event.clientY - box.top - (box.height - height * scale) / 2) / scale);
      if (x >= 0 && y >= 0 && x < width && y < height) return [y * width + x, width * height];
    }
  };

  document.addEventListener("pointermove", event => {
    const [index, pixels] = pixelUnder(event) ?? [];
    tip.hidden = !(index < codes.length);
    if (tip.hidden) return;
    const metres = codes[pixels + index];  // in centimetres; not there before metres are known
    tip.textContent = (codes[index] / 65535).toFixed(4)
      + (metres === undefined ? "" : `, ${(metres / 100).toFixed(2)} m`);
    tip.style.translate = `${Math.min(event.clientX + 16, innerWidth - 140)}px`
      + ` ${Math.max(event.clientY - 32, 0)}px`;
  });
}
