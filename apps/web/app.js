// Photos that are pasted anywhere in the page are added like chosen ones.
document.addEventListener("paste", event => {
  const files = event.clipboardData.files, data = new DataTransfer();
  const input = document.querySelector("#photos input[type=file]");
  if (!files.length || !input) return;
  for (const file of files) data.items.add(file);
  input.files = data.files;
  input.dispatchEvent(new Event("change", {bubbles: true}));
});
