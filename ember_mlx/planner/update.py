"""What the optimizers make of the gradients, as MLX's and ours are written."""

from ember_mlx.planner.builder import FLOAT32, Builder

ROWS_PER_BLOCK = 4096  # of ember_mlx.optimizers.ember
SMALL, NEIGHBOURS = 2**16, 16  # of ember_mlx.optimizers.guarded
ADDED_AT_ONCE = 16  # that many additions are compiled into one kernel


class Update(Builder):
    def update(self):
        """The optimizer's step on every gradient, guarded: nothing is changed unless all of them are finite."""
        run, tables = self.run, {table.name for table in self.model.tables()}
        order = [name for name in self.weights if name in self.gradients]
        if run.accumulate:
            for name in order:
                before = self.is_there(self.gradients[name].numbers, self.gradients[name].width, "gradients")
                self.gradients[name] = self.elementwise([self.gradients[name], before], role="gradients")
        self._role = "scratch"
        optimizers = {name: run.table_optimizer if name in tables else run.optimizer for name in order}
        means = {name: self._mean_squares(name) for name in order if optimizers[name] == "ember"}
        finite = self._finite([means.get(name, self.gradients[name]) for name in order])
        states = []
        for name in sorted(order, key=lambda name: name in tables):
            g, w = self.gradients[name], self.weights[name]
            new, state = getattr(self, f"_{optimizers[name]}")(name, g, w, finite, means.get(name))
            new.role = "weights"
            self.results.append(new)
            states += state
        for array in states:
            array.role = "optimizer state"
        self.results += states
        self.results += [w for name, w in self.weights.items() if name not in order]  # frozen: the model keeps them

    def _finite(self, witnesses):
        """One number of all of them: neighbours of one shape, if they are small, are added up first."""
        small, sums = {}, []
        for place, array in enumerate(witnesses):
            if array.numbers < SMALL:
                small.setdefault((place // NEIGHBOURS, array.numbers), []).append(array)
            else:
                sums.append(self.make([array], 1))
        for alike in small.values():
            while len(alike) > 1:
                groups = [alike[i : i + ADDED_AT_ONCE] for i in range(0, len(alike), ADDED_AT_ONCE)]
                alike = [self.elementwise(group, width=FLOAT32) for group in groups]
            sums.append(self.make(alike, 1))
        return self.make(sums, 1)

    def _state(self, numbers, width):
        return self.is_there(numbers, width, "optimizer state")

    def _mean_squares(self, name):
        """Ember's row and column means: one kernel on a GPU, blocks of float32 squares elsewhere."""
        g, (rows, columns) = self.gradients[name], self.shapes[name]
        if self.backend != "cpu":
            return self.make([g], rows + columns, FLOAT32)
        sums = []
        for first in range(0, rows, ROWS_PER_BLOCK):
            height = min(ROWS_PER_BLOCK, rows - first)
            squares = self.elementwise([g], height * columns, FLOAT32)
            sums += [self.make([squares], height, FLOAT32), self.make([squares], columns, FLOAT32)]
        return self.make(sums, rows + columns, FLOAT32)

    def _ember(self, name, g, w, finite, means):
        moment = self._state(means.numbers, FLOAT32)
        new = self.elementwise([moment, means])
        if self.run.stochastic_rounding and w.width < FLOAT32:
            g = self.make([w, g, new], w.numbers)  # a kernel, and blocks on a CPU, write a new table
        return self.elementwise([w, g, new, finite], w.numbers), [self.elementwise([new, moment, finite])]

    def _adam(self, name, g, w, finite, means):
        moments = [self._state(w.numbers, w.width) for _ in "mv"]
        new = [self.elementwise([moment, g]) for moment in moments]
        return self.elementwise([w, *new, finite]), [
            self.elementwise([n, moment, finite]) for n, moment in zip(new, moments, strict=True)
        ]

    _adamw = _adam

    def _sgd(self, name, g, w, finite, means):
        self._state(w.numbers, w.width)  # kept, though there is no momentum
        return self.elementwise([w, g, finite]), []

    def _muon(self, name, g, w, finite, means):
        moment = self._state(w.numbers, w.width)
        new = self.elementwise([moment, g])
        update = self.elementwise([new, g])
        for _ in range(5 if len(self.shapes[name]) == 2 else 0):  # Newton-Schulz
            side = min(self.shapes[name])
            square = self.make([update], side * side)
            update = self.elementwise([update, self.make([square, update], w.numbers)])
        return self.elementwise([w, update, finite]), [self.elementwise([new, moment, finite])]

    def _adafactor(self, name, g, w, finite, means):
        shape = self.shapes[name]
        squares = self.elementwise([g])
        if len(shape) < 2:
            moment = self._state(w.numbers, w.width)
            new = self.elementwise([moment, squares])
            return self.elementwise([w, g, new, finite]), [self.elementwise([new, moment, finite])]
        moments = [self._state(size, w.width) for size in shape]
        new = [self.elementwise([moment, self.make([squares], moment.numbers)]) for moment in moments]
        update = self.elementwise([self.make(new, w.numbers), g])
        size = self.make([self.elementwise([update])], 1)
        return self.elementwise([w, update, size, finite]), [
            self.elementwise([n, moment, finite]) for n, moment in zip(new, moments, strict=True)
        ]
