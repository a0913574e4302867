"""From a prompt to a mesh in Python, with a callback that prints the losses of every hundredth step.

Minutes on two CPU cores; writes to out/armchair. Needs `pip install ".[generate]"`.
"""

from dreamfusion_fast import Generator
from dreamfusion_fast.training.callbacks import Callback


class Report(Callback):
    def on_step(self, trainer, result):
        if result.step % 100 == 0:
            print(result.step, {name: round(float(value), 4) for name, value in result.losses.items()})


result = Generator("an armchair", out="out/armchair", seed=1, callbacks=[Report()]).run()
print(result.folder, result.mesh.faces)
