package edgellama.app

import edgellama.core.BundleException
import edgellama.core.Challenge
import edgellama.core.ChallengeRun
import edgellama.core.GoldenCheck
import edgellama.core.GoldenResult
import edgellama.core.SequenceResult
import java.io.File

/** The accuracy check: replays the bundle's golden vectors and writes the device log; or answers a challenge. */
object AccuracyScreen : Screen() {
    private var directory: File? = null

    var progress = 0 to 1
        private set
    var report = ""
        private set
    var json: String? = null
        private set

    /** Whether the last check passed; null before there is one. */
    var passed: Boolean? = null
        private set

    /** Whether the last thing that was asked is a challenge, and not the check. */
    var isChallenge = false
        private set

    fun open(bundle: File) {
        if (bundle == directory) return
        abandon()
        directory = bundle
        report = ""
        json = null
        passed = null
        error = null
    }

    fun stop() {
        run?.stopped = true
    }

    fun start(): Unit = start(false) { bundle, run -> check(bundle, run) }

    /** Answers the challenge that lies in Storage. [copy] puts it there first, on the worker's thread. */
    fun answer(copy: () -> Unit = {}): Unit = start(true) { bundle, run ->
        copy()
        answer(bundle, run)
    }

    private fun start(challenge: Boolean, work: (File, Run) -> Unit) {
        val bundle = directory
        if (busy || bundle == null) return
        isChallenge = challenge
        val run = Run()
        this.run = run
        report = ""
        json = null
        passed = null
        error = null
        progress = 0 to 1
        changed()
        Worker.run({ if (run === this.run) failed(bundle, it) }) { work(bundle, run) }
    }

    private fun answer(directory: File, run: Run) {
        responseFile(directory).delete()
        responseErrorFile(directory).delete()
        val file = Storage.challenge(directory)
        val text = if (file.isFile) file.readText() else throw BundleException(
            "no challenge for this bundle on this device (${file.path})",
            "Pick the file that `edgellama challenge` wrote, or push it there with adb.",
        )
        val loaded = Models.load(directory) { step -> tell(run) { say(step) } }
        val challenge = Challenge.parse(text, file.name, loaded.bundle, Models.TARGET)
        tell(run) { say("Answering the challenge ${challenge.nonce.take(12)}… at ${challenge.positions} positions.") }
        loaded.session.reset()
        val response = ChallengeRun(loaded.bundle, challenge).run(loaded.session.model, { run.stopped }) { done ->
            tell(run) { advance(done, challenge.positions, null) }
        }
        if (response == null) return tell(run) { failed(directory, STOPPED) }
        val answer = response.toJson(Phone.device, loaded.loadMillis, Phone.peakBytes())
        Storage.write(responseFile(directory).name, answer)
        tell(run) { answered(answer) }
    }

    private fun answered(answer: String) {
        run = null
        json = answer
        report += "\nAnswered. Only the host can judge it: edgellama validate --challenge … --response …\n"
        changed()
    }

    fun responseFile(bundle: File) = File(Storage.results, "${bundle.name}-response.json")

    private fun responseErrorFile(bundle: File) = File(Storage.results, "${bundle.name}-response-error.txt")

    private fun check(directory: File, run: Run) {
        // So that no script takes an old result for a new one.
        resultFile(directory).delete()
        errorFile(directory).delete()
        val loaded = Models.load(directory) { step -> tell(run) { say(step) } }
        val golden = GoldenCheck(loaded.bundle, Models.TARGET, Phone.processorKind)
        tell(run) { say("Replaying ${golden.positions} positions. KL from the host's run of the same file:") }
        loaded.session.reset()
        val result = golden.run(loaded.session.model, loaded.tokenizer, { run.stopped }) { done, sequence ->
            tell(run) { advance(done, golden.positions, sequence) }
        }
        if (result == null) return tell(run) { failed(directory, STOPPED) }
        val log = result.toJson(Phone.device, loaded.loadMillis, Phone.peakBytes())
        Storage.write(resultFile(directory).name, log)
        tell(run) { finished(result, log) }
    }

    fun resultFile(bundle: File) = File(Storage.results, "${bundle.name}-device.json")

    /** Why the check could not be made. */
    private fun errorFile(bundle: File) = File(Storage.results, "${bundle.name}-device-error.txt")

    private fun say(text: String) {
        report += "$text\n"
        changed()
    }

    private fun advance(done: Int, all: Int, sequence: SequenceResult?) {
        progress = done to all
        if (sequence != null) {
            val tokens = if (sequence.tokensMatch) "" else "  OTHER TOKENS THAN THE HOST'S"
            report += "%.2e  %s%s\n".format(sequence.parityKl.average(), sequence.name, tokens)
        }
        changed()
    }

    private fun finished(result: GoldenResult, log: String) {
        run = null
        json = log
        passed = result.passed
        report += verdict(result)
        changed()
    }

    private fun verdict(result: GoldenResult): String = buildString {
        append('\n')
        for (check in result.checks) {
            append(if (check.passed) "ok    " else "FAIL  ")
            append("${check.name}: ${number(check.value)}, limit ${number(check.limit)}\n")
        }
        append("\nKL from the full-precision model %.4f\n".format(result.klMean))
        append("top-1 %.1f%% of the host's run, %.1f%% of the full-precision model\n".format(100 * result.parityTop1, 100 * result.top1))
        append("prefill ${perSecond(result.prefillRate)}, decode ${perSecond(result.decodeRate)}\n")
        append(if (result.passed) "\nPASS: this device computes the model as it was validated.\n" else "\nFAIL\n")
    }

    private fun number(value: Any?) = if (value is Double) "%.2e".format(value) else value.toString()

    private fun failed(bundle: File, reason: String) {
        run = null
        error = reason
        Storage.writeError((if (isChallenge) responseErrorFile(bundle) else errorFile(bundle)).name, reason)
        changed()
    }

    private const val STOPPED = "The check was stopped before its end.\nLeave the app in the foreground until it is done."
}
