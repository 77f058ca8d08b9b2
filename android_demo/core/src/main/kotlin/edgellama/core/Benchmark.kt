package edgellama.core

/** What a benchmark runs. Prefill of [promptTokens], then [decodeTokens] single steps; [warmUps] runs are not counted. */
data class BenchmarkPlan(
    val promptTokens: Int = 128,
    val decodeTokens: Int = 64,
    val warmUps: Int = 1,
    val runs: Int = 5,
) {
    init {
        require(promptTokens > 0 && decodeTokens > 0 && warmUps >= 0 && runs > 0) { "nothing to measure in $this" }
    }
}

/** Median and range of a figure over the runs. */
class Figure(values: List<Double>) {
    val low: Double = values.min()
    val high: Double = values.max()
    val median: Double = values.sorted().let { (it[it.size / 2] + it[(it.size - 1) / 2]) / 2 }

    internal fun toMap() = mapOf("median" to median, "min" to low, "max" to high)
}

class BenchmarkResult(
    val plan: BenchmarkPlan,
    val target: String,
    val runtime: String,
    val prefillRate: Figure,
    val decodeRate: Figure,
    val firstTokenMillis: Figure,
) {
    /** Schema edgellama.benchmark/1. [extra]: figures that only the app can read, such as memory and temperature. */
    fun toJson(bundle: Bundle, device: Device, loadMillis: Double?, extra: Map<String, Any?>): String = Json.write(
        mapOf(
            "schema" to "edgellama.benchmark/1",
            "bundle" to bundle.name,
            "recipe" to bundle.recipe,
            "target" to target,
            "artifact_sha256" to bundle.artifactSha256(target),
            "device" to device.name,
            "os" to device.os,
            "runtime" to runtime,
            "prompt_tokens" to plan.promptTokens,
            "decode_tokens" to plan.decodeTokens,
            "warm_ups" to plan.warmUps,
            "runs" to plan.runs,
            "prefill_tok_s" to prefillRate.toMap(),
            "decode_tok_s" to decodeRate.toMap(),
            "first_token_ms" to firstTokenMillis.toMap(),
            "load_ms" to loadMillis,
        ) + extra,
    )
}

/** Measures prefill and decode. The tokens are the golden check's kind of text or any other: time does not depend on them. */
class Benchmark(private val model: LogitsModel, private val target: String, private val clock: Clock = Clock.SYSTEM) {
    /** Runs [plan] on [text], repeated as needed. Null when [stopped] said so. */
    fun run(
        plan: BenchmarkPlan,
        text: IntArray,
        stopped: () -> Boolean = { false },
        onRun: (Int) -> Unit = {},
    ): BenchmarkResult? {
        val count = plan.promptTokens + plan.decodeTokens
        if (count > model.contextLength) {
            throw ContextException("the benchmark needs $count tokens, the context holds ${model.contextLength}")
        }
        require(text.isNotEmpty()) { "no text to run" }
        val tokens = IntArray(count) { text[it % text.size] }
        val prefill = ArrayList<Double>()
        val decode = ArrayList<Double>()
        val first = ArrayList<Double>()
        for (run in 0 until plan.warmUps + plan.runs) {
            if (stopped()) return null
            val start = clock.nanos()
            Sampler.best(model.forward(tokens.copyOf(plan.promptTokens), 0))
            val middle = clock.nanos()
            for (i in plan.promptTokens until count) {
                if (stopped()) return null
                Sampler.best(model.forward(intArrayOf(tokens[i]), i))
            }
            val end = clock.nanos()
            if (run >= plan.warmUps) {
                prefill.add(plan.promptTokens * 1e9 / (middle - start))
                decode.add(plan.decodeTokens * 1e9 / (end - middle))
                first.add((middle - start) / 1e6)
            }
            onRun(run + 1)
        }
        return BenchmarkResult(plan, target, model.runtime, Figure(prefill), Figure(decode), Figure(first))
    }
}
