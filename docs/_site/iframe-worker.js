// A page that is opened as a file may start no worker. There the search runs in a hidden frame instead; a page that is
// served uses the browser's workers, and this file does nothing.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      this.ready = new Promise((ready) => frame.addEventListener("load", () => ready(frame.contentWindow), { once: true }));
      frame.srcdoc =
        "<script>" +
        // What a worker sends goes to the page, as an event that says it is a message.
        "postMessage = (data) => frameElement.dispatchEvent(new MessageEvent('sent', { data }));" +
        "importScripts = (...urls) => urls.reduce((before, src) => before.then(() => new Promise((done) => {" +
        "  document.head.appendChild(Object.assign(document.createElement('script'), { src, onload: done })); })), Promise.resolve());" +
        '</script><script src="' + new URL(url, location.href) + '"></script>';
      frame.addEventListener("sent", (event) => {
        this.dispatchEvent(new MessageEvent("message", { data: event.data }));
      });
      document.body.appendChild(frame);
    }

    postMessage(data) {
      this.ready.then((frame) => frame.dispatchEvent(new frame.MessageEvent("message", { data })));
    }

    terminate() {}
  };
}
