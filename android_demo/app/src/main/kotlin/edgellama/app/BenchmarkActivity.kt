package edgellama.app

import android.os.Bundle
import android.widget.EditText
import edgellama.core.BenchmarkPlan

class BenchmarkActivity : MeasureActivity(R.layout.benchmark, BenchmarkScreen) {
    override val busy get() = BenchmarkScreen.busy
    override val text get() = BenchmarkScreen.report
    override val json get() = BenchmarkScreen.json
    override val progress get() = BenchmarkScreen.progress

    override val outcome: String?
        get() = when {
            BenchmarkScreen.json != null -> "benchmark done ${BenchmarkScreen.resultFile(bundle)}"
            else -> BenchmarkScreen.error?.let { "benchmark error ${it.replace('\n', ' ')}" }
        }

    override fun onCreate(state: Bundle?) {
        super.onCreate(state)
        if (state == null) {
            field(R.id.prompt_tokens).setText(BenchmarkScreen.plan.promptTokens.toString())
            field(R.id.decode_tokens).setText(BenchmarkScreen.plan.decodeTokens.toString())
            field(R.id.runs).setText(BenchmarkScreen.plan.runs.toString())
        }
    }

    override fun open() = BenchmarkScreen.open(bundle)

    override fun start() {
        val old = BenchmarkScreen.plan
        BenchmarkScreen.plan = BenchmarkPlan(
            number(R.id.prompt_tokens) ?: old.promptTokens,
            number(R.id.decode_tokens) ?: old.decodeTokens,
            old.warmUps,
            number(R.id.runs) ?: old.runs,
        )
        BenchmarkScreen.start(applicationContext)
    }

    override fun stop() = BenchmarkScreen.stop()

    /** A count in a field; null when it holds none. */
    private fun number(id: Int): Int? = field(id).text.toString().toIntOrNull()?.takeIf { it > 0 }

    private fun field(id: Int): EditText = view(id)
}
