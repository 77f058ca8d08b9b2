package edgellama.app

import android.content.Context
import edgellama.core.Benchmark
import edgellama.core.BenchmarkPlan
import edgellama.core.BenchmarkResult
import edgellama.core.Figure
import java.io.File

/** The benchmark: prefill and decode, several runs, median and range. */
object BenchmarkScreen : Screen() {
    private var directory: File? = null

    var plan = BenchmarkPlan()
    var progress = 0 to 1
        private set
    var report = ""
        private set
    var json: String? = null
        private set

    fun open(bundle: File) {
        if (bundle == directory) return
        abandon()
        directory = bundle
        report = ""
        json = null
        error = null
    }

    fun stop() {
        run?.stopped = true
    }

    /** [context]: the application's, which outlives an activity. */
    fun start(context: Context) {
        val bundle = directory
        if (busy || bundle == null) return
        val run = Run()
        this.run = run
        report = ""
        json = null
        error = null
        progress = 0 to plan.warmUps + plan.runs
        changed()
        val plan = plan
        Worker.run({ if (run === this.run) failed(bundle, it) }) { measure(bundle, plan, context, run) }
    }

    fun resultFile(bundle: File) = File(Storage.results, "${bundle.name}-benchmark.json")

    /** Why there is no result. */
    private fun errorFile(bundle: File) = File(Storage.results, "${bundle.name}-benchmark-error.txt")

    private fun measure(directory: File, plan: BenchmarkPlan, context: Context, run: Run) {
        resultFile(directory).delete()
        errorFile(directory).delete()
        val loaded = Models.load(directory) { step -> tell(run) { say(step) } }
        val before = Phone.thermalStatus(context)
        loaded.session.reset()
        val text = loaded.tokenizer.encode(TEXT, addSpecialTokens = false)
        val result = Benchmark(loaded.session.model, Models.TARGET)
            .run(plan, text, { run.stopped }) { done -> tell(run) { advance(done) } }
        if (result == null) return tell(run) { failed(directory, STOPPED) }
        val extra = mapOf(
            "peak_bytes" to Phone.peakBytes(),
            "thermal_status_before" to before,
            "thermal_status_after" to Phone.thermalStatus(context),
        )
        val log = result.toJson(loaded.bundle, Phone.device, loaded.loadMillis, extra)
        Storage.write(resultFile(directory).name, log)
        tell(run) { finished(result, log, loaded.loadMillis) }
    }

    private fun say(text: String) {
        report += "$text\n"
        changed()
    }

    private fun advance(done: Int) {
        progress = done to progress.second
        changed()
    }

    private fun finished(result: BenchmarkResult, log: String, loadMillis: Double) {
        run = null
        json = log
        report += """

            prefill of ${result.plan.promptTokens}: ${range(result.prefillRate)} tok/s
            decode of ${result.plan.decodeTokens}: ${range(result.decodeRate)} tok/s
            first token: ${range(result.firstTokenMillis)} ms
            load: ${"%.0f".format(loadMillis)} ms
            memory at most: ${megabytes(Phone.peakBytes())}

            Median of ${result.plan.runs} runs [lowest, highest], after ${result.plan.warmUps} to warm up.
        """.trimIndent()
        changed()
    }

    private fun range(figure: Figure) = "%.1f [%.1f, %.1f]".format(figure.median, figure.low, figure.high)

    private fun failed(bundle: File, reason: String) {
        run = null
        error = reason
        Storage.writeError(errorFile(bundle).name, reason)
        changed()
    }

    private const val STOPPED = "The benchmark was stopped before its end.\nLeave the app in the foreground until it is done."
    private const val TEXT = "The quick brown fox jumps over the lazy dog, and then it does so once more. "
}
