package edgellama.app

import android.app.Activity
import android.os.Bundle
import android.widget.Button
import android.widget.EditText
import android.widget.LinearLayout
import android.widget.ProgressBar
import android.widget.TextView
import java.io.File
import kotlin.math.roundToInt

/** A text, and its label with the probabilities of all labels. */
class ClassifyActivity : Activity() {
    private lateinit var labels: LinearLayout
    private lateinit var input: EditText
    private lateinit var classify: Button

    override fun onCreate(state: Bundle?) {
        super.onCreate(state)
        setContentView(R.layout.classify)
        labels = view(R.id.labels)
        input = view(R.id.input)
        classify = view(R.id.classify)
        val name = intent.getStringExtra(MainActivity.BUNDLE) ?: return finish()
        title = name
        ClassifyScreen.open(File(Storage.bundles, name))
        classify.setOnClickListener {
            if (ClassifyScreen.busy) ClassifyScreen.stop() else ClassifyScreen.classify(input.text.toString())
        }
    }

    override fun onStart() {
        super.onStart()
        ClassifyScreen.observe(::render)
    }

    /** An answer that nobody sees costs battery; a rotation is no reason to end it. */
    override fun onStop() {
        super.onStop()
        ClassifyScreen.release()
        if (!isChangingConfigurations) ClassifyScreen.stop()
    }

    private fun render() {
        view<TextView>(R.id.status).text = ClassifyScreen.error ?: ClassifyScreen.status
        val judged = ClassifyScreen.judged
        view<TextView>(R.id.label).text = judged?.answer?.label.orEmpty()
        view<TextView>(R.id.flagged).text = judged?.let(::verdict).orEmpty()
        labels.removeAllViews()
        judged?.answer?.probabilities?.forEach { (label, probability) -> show(label, probability) }
        classify.setText(if (ClassifyScreen.busy) R.string.stop else R.string.classify)
        keepScreenOn(ClassifyScreen.busy)
    }

    private fun verdict(judged: Judged): String {
        val threshold = judged.threshold
        val lines = ArrayList<String>()
        if (threshold != null) {
            val id = if (judged.answer.flagged == true) R.string.flagged else R.string.not_flagged
            lines += getString(id, threshold.label, percent(threshold.probability))
        }
        judged.answer.categories?.let { if (it.isNotEmpty()) lines += getString(R.string.categories, it.joinToString()) }
        return lines.joinToString("\n")
    }

    private fun show(label: String, probability: Double) {
        val name = TextView(this)
        name.text = getString(R.string.share_of_label, label, percent(probability))
        labels.addView(name)
        val bar = ProgressBar(this, null, android.R.attr.progressBarStyleHorizontal)
        bar.max = STEPS
        bar.progress = (STEPS * probability).roundToInt()
        bar.contentDescription = name.text
        labels.addView(bar)
    }

    private fun percent(share: Double) = "%.1f %%".format(100 * share)

    private companion object {
        const val STEPS = 1000
    }
}
