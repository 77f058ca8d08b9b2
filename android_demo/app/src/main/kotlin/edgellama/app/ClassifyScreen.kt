package edgellama.app

import edgellama.core.Classification
import edgellama.core.TextClassifier
import edgellama.core.Threshold
import java.io.File

/** What is shown about one text. [threshold] decides about [Classification.flagged]; null without one. */
class Judged(val answer: Classification, val threshold: Threshold?, val millis: Double)

/** Labels of texts: one at a time, each read from the start. */
object ClassifyScreen : Screen() {
    private var directory: File? = null

    var judged: Judged? = null
        private set
    var status = ""
        private set

    fun open(bundle: File) {
        if (bundle == directory) return
        abandon()
        directory = bundle
        judged = null
        error = null
        status = ""
    }

    fun stop() {
        run?.stopped = true
    }

    fun classify(text: String) {
        val bundle = directory
        if (busy || bundle == null) return
        val run = Run()
        this.run = run
        judged = null
        error = null
        changed()
        Worker.run({ if (run === this.run) failed(it) }) { classify(bundle, text, run) }
    }

    private fun classify(directory: File, text: String, run: Run) {
        val loaded = Models.load(directory) { step -> tell(run) { show(step) } }
        val classifier = TextClassifier.of(loaded.bundle, Models.TARGET, loaded.tokenizer)
        tell(run) { show("Reading…") }
        val start = System.nanoTime()
        val answer = classifier.classify(loaded.session, text) { run.stopped }
        val millis = (System.nanoTime() - start) / 1e6
        if (answer == null) return tell(run) { failed("Stopped.") }
        tell(run) { finished(loaded, Judged(answer, classifier.threshold, millis)) }
    }

    private fun show(step: String) {
        status = step
        changed()
    }

    private fun finished(loaded: Loaded, found: Judged) {
        run = null
        judged = found
        status = "load %.0f ms · answer %.0f ms (%d tokens) · %s".format(
            loaded.loadMillis, found.millis, found.answer.tokens, megabytes(Phone.usedBytes()),
        )
        changed()
    }

    private fun failed(reason: String) {
        run = null
        status = ""
        error = reason
        changed()
    }
}
