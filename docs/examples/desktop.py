"""A window that draws what you type, shows how the picture comes about, can be stopped, and saves it with its recipe.

One file to copy. It uses Tk, which comes with Python: nothing to install, a few megabytes when packed. Qt looks better
and has more to build from, for 250 MB (PySide6-Essentials 6.12). The window's thread never draws: a worker does, and
hands what is to be shown over a queue.

Run: python desktop.py [BUNDLE]
"""

import io
import queue
import sys
import threading
import tkinter as tk
from tkinter import filedialog, messagebox, ttk

from PIL import Image

import piflow_edge as pf

SIDE = 384  # of the picture on the screen, in pixels
POLL_MS = 15  # between two looks at what the worker has to say
PREVIEW_EVERY = 16  # substeps of a policy between two previews; they cost no network call
HINT = "Return draws, Escape stops, Ctrl+S saves"


class Worker(threading.Thread):
    """Opens a bundle, then draws what is put into `orders`, the arguments of a generator's call; None ends it.

    `news` are pairs of a word and what belongs to it: ("opened", generator), ("preview", (image, share done)),
    ("drawn", result), ("stopped", None), ("failed", error), ("ended", error) where it can do no more.
    """

    def __init__(self, bundle: str):
        super().__init__(daemon=True)
        self.bundle, self.cancel = bundle, threading.Event()
        self.orders: queue.Queue = queue.Queue()
        self.news: queue.Queue = queue.Queue()

    def run(self) -> None:
        try:
            with pf.load(self.bundle) as generator:
                self.news.put(("opened", generator))
                while (order := self.orders.get()) is not None:
                    self.news.put(self._draw(generator, order))
        except Exception as error:  # the edge of a thread: nobody else would hear of it
            self.news.put(("ended", error))

    def _draw(self, generator: pf.Generator, order: dict) -> tuple:
        def show(progress: pf.Progress) -> None:
            share = (progress.call - 1 + progress.substep / progress.substeps) / progress.nfe
            self.news.put(("preview", (generator.decode(progress.x_0)[0], share)))

        try:
            watched = {"callback": show, "callback_every": PREVIEW_EVERY, "cancel": self.cancel}
            return "drawn", generator(**order, **watched)
        except pf.Cancelled:
            return "stopped", None
        except pf.PiFlowError as error:
            return "failed", error


class Window:
    def __init__(self, root: tk.Tk, worker: Worker):
        self.root, self.worker = root, worker
        self.is_closed, self.is_steered = False, True
        self.result: pf.Result | None = None
        self.prompt, self.seed, self.calls = tk.StringVar(), tk.StringVar(value="0"), tk.StringVar()
        self.status = tk.StringVar(value=f"opening {worker.bundle} ...")
        root.title(f"piflow-edge: {worker.bundle}")
        root.protocol("WM_DELETE_WINDOW", self.close)
        self._build(ttk.Frame(root, padding=12))
        for key, act in {"<Return>": self.draw, "<Escape>": self.stop, "<Control-s>": self.save}.items():
            root.bind(key, lambda event, act=act: act())
        worker.start()
        root.after(POLL_MS, self._poll)

    def _build(self, frame: ttk.Frame) -> None:
        frame.grid()
        self.entry = ttk.Entry(frame, textvariable=self.prompt, width=34)
        self.entry.grid(columnspan=4, sticky="ew")
        ttk.Label(frame, text="seed").grid(row=1, column=0, sticky="e", pady=8)
        ttk.Spinbox(frame, textvariable=self.seed, from_=0, to=2**31, width=10).grid(
            row=1, column=1, sticky="w"
        )
        ttk.Label(frame, text="network calls").grid(row=1, column=2, sticky="e")
        self.choice = ttk.Combobox(frame, textvariable=self.calls, width=4, state="readonly")
        self.choice.grid(row=1, column=3, sticky="w")
        self.picture = ttk.Label(frame)
        self.picture.grid(row=2, columnspan=4)
        self.bar = ttk.Progressbar(frame, maximum=1, length=SIDE)
        self.bar.grid(row=3, columnspan=4, pady=8)
        self.buttons = {}
        for column, (text, act) in enumerate(
            {"Draw": self.draw, "Stop": self.stop, "Save": self.save}.items()
        ):
            self.buttons[text] = ttk.Button(frame, text=text, command=act, state="disabled")
            self.buttons[text].grid(row=4, column=column)
        ttk.Label(frame, textvariable=self.status, wraplength=SIDE).grid(
            columnspan=4, sticky="w", pady=(8, 0)
        )
        self._show(Image.new("RGB", (1, 1), "white"))

    def draw(self) -> None:
        if not self._can("Draw"):
            return
        seed = self.seed.get()  # what is no number is left to the generator, whose error says what it takes
        order = {"nfe": int(self.calls.get()), "seed": int(seed) if seed.isdecimal() else seed}
        self.worker.cancel.clear()
        self.worker.orders.put(order | ({"subject": self.prompt.get()} if self.is_steered else {"count": 1}))
        self._enable("Stop")

    def stop(self) -> None:
        self.worker.cancel.set()

    def save(self) -> None:
        if not self._can("Save") or self.result is None:
            return
        kinds = [("PNG", "*.png"), ("WebP", "*.webp"), ("JPEG", "*.jpg")]
        if not (path := filedialog.asksaveasfilename(defaultextension=".png", filetypes=kinds)):
            return
        try:
            self.result.save(path)
        except (pf.PiFlowError, OSError) as error:
            messagebox.showerror("piflow-edge", str(error))
        else:
            self.status.set(f"saved {path}; it holds what makes it again")

    def close(self) -> None:
        if self.is_closed:
            return
        self.is_closed = True
        self.worker.cancel.set()
        self.worker.orders.put(None)
        self.root.destroy()

    def _poll(self) -> None:
        while not (self.is_closed or self.worker.news.empty()):
            word, what = self.worker.news.get()
            getattr(self, f"_when_{word}")(what)
        if not self.is_closed:
            self.root.after(POLL_MS, self._poll)

    def _when_opened(self, generator: pf.Generator) -> None:
        self.is_steered = bool(generator.conditioner.inputs)
        self.choice["values"] = generator.trained_nfes
        self.calls.set(str(generator.trained_nfes[-1]))
        self.status.set(f"{generator.conditioner.summarize()}. {HINT}")
        self.entry.focus()
        self._enable("Draw")

    def _when_preview(self, preview: tuple) -> None:
        pixels, share = preview
        self._show(Image.fromarray(pixels.squeeze()))
        self.bar["value"] = share

    def _when_drawn(self, result: pf.Result) -> None:
        self.result = result
        self._show(result.images[0])
        self.bar["value"] = 1
        self.status.set(f"{result.timings['total']:.0f} ms on {result.engine}. {HINT}")
        self._enable("Draw", "Save")

    def _when_stopped(self, _: None) -> None:
        self.status.set("stopped")
        self._enable("Draw")

    def _when_failed(self, error: pf.PiFlowError) -> None:
        messagebox.showerror("piflow-edge", str(error))
        self._enable("Draw")

    def _when_ended(self, error: Exception) -> None:
        messagebox.showerror("piflow-edge", str(error))
        self.close()

    def _show(self, image: Image.Image) -> None:
        # Not by Pillow's ImageTk, which PyInstaller packs only half. Kept, as Tk shows no image that Python forgot.
        file = io.BytesIO()
        image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(file, "PPM")
        self.shown = tk.PhotoImage(data=file.getvalue())
        self.picture["image"] = self.shown

    def _can(self, button: str) -> bool:
        return str(self.buttons[button]["state"]) == "normal"

    def _enable(self, *names: str) -> None:
        for name, button in self.buttons.items():
            button["state"] = "normal" if name in names else "disabled"


def main() -> None:
    root = tk.Tk()
    Window(root, Worker(sys.argv[1] if len(sys.argv) > 1 else "emoji"))
    root.mainloop()


if __name__ == "__main__":
    main()
