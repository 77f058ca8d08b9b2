package edgellama.app

import android.app.Activity
import android.content.Intent
import android.os.Bundle
import android.view.View
import android.widget.ArrayAdapter
import android.widget.Button
import android.widget.ListView
import android.widget.TextView
import edgellama.core.Bundle as ModelBundle
import edgellama.core.EdgeLlamaException
import java.io.File

/** The bundles on this device, and what is in the chosen one. Scripts start their work here. */
class MainActivity : Activity() {
    private lateinit var list: ListView
    private lateinit var summary: TextView
    private lateinit var actions: List<Button>
    private lateinit var talk: Button
    private var classifies = false
    private var directories = emptyList<File>()
    private var chosen: String? = null
    private var busy = false

    override fun onCreate(state: Bundle?) {
        super.onCreate(state)
        setContentView(R.layout.main)
        list = view(R.id.bundles)
        summary = view(R.id.summary)
        chosen = state?.getString(CHOSEN)
        list.setOnItemClickListener { _, _, position, _ ->
            chosen = directories[position].name
            show()
        }
        talk = button(R.id.chat) { open(if (classifies) ClassifyActivity::class.java else ChatActivity::class.java) }
        actions = listOf(
            talk,
            button(R.id.benchmark) { open(BenchmarkActivity::class.java) },
            button(R.id.accuracy) { open(AccuracyActivity::class.java) },
        )
        button(R.id.add) { pick() }
        if (state == null) script(intent)
    }

    override fun onNewIntent(intent: Intent) {
        super.onNewIntent(intent)
        script(intent)
    }

    override fun onStart() {
        super.onStart()
        refresh()
    }

    override fun onSaveInstanceState(state: Bundle) {
        super.onSaveInstanceState(state)
        state.putString(CHOSEN, chosen)
    }

    /** `--es bundle NAME` with `--ez check true`, `challenge` or `benchmark`: does that, writes its file, and closes. */
    private fun script(intent: Intent) {
        val bundle = intent.getStringExtra(BUNDLE) ?: return
        val activity = when {
            intent.getBooleanExtra("check", false) -> AccuracyActivity::class.java
            intent.getBooleanExtra(AccuracyActivity.CHALLENGE, false) -> AccuracyActivity::class.java
            intent.getBooleanExtra("benchmark", false) -> BenchmarkActivity::class.java
            else -> return
        }
        startActivity(Intent(intent).setClass(this, activity).putExtra(BUNDLE, bundle).putExtra(SCRIPT, true))
    }

    private fun refresh() {
        directories = Storage.list()
        if (directories.none { it.name == chosen }) chosen = directories.firstOrNull()?.name
        val names = directories.map { it.name }
        list.adapter = ArrayAdapter(this, android.R.layout.simple_list_item_single_choice, names)
        list.setItemChecked(names.indexOf(chosen), true)
        show()
    }

    private fun show() {
        val directory = directories.firstOrNull { it.name == chosen }
        actions.forEach { it.isEnabled = false }
        if (directory == null) {
            summary.text = getString(R.string.no_bundles, Storage.bundles.path)
            return
        }
        try {
            val bundle = Storage.bundle(directory)
            summary.text = describe(bundle)
            classifies = bundle.classifier != null
            talk.setText(if (classifies) R.string.classify else R.string.chat)
            actions.forEach { it.isEnabled = !busy }
        } catch (error: EdgeLlamaException) {
            summary.text = error.text
        }
    }

    private fun describe(bundle: ModelBundle): String {
        val (free, whole) = Phone.memory(this)
        val lines = arrayListOf(
            bundle.name + (bundle.version?.let { ", version $it" } ?: ""),
            "%.1fM parameters, recipe %s".format(bundle.parameters / 1e6, bundle.recipe),
            "context of ${bundle.contextLength} tokens, vocabulary of ${bundle.vocabSize}",
            "licence: ${bundle.license ?: "not stated"}",
        )
        Phone.processorWarning?.let { lines += "\n$it" }
        for (artifact in bundle.artifacts) {
            lines += ""
            lines += "${artifact.target}: ${artifact.path}, ${megabytes(artifact.bytes)}"
            lines += "${artifact.schemes.joinToString()}; ${artifact.runtime} ${artifact.minVersion} or newer"
            lines += "about ${megabytes(artifact.peakBytes)} of memory; ${megabytes(free)} of ${megabytes(whole)} are free"
            lines += bundle.accuracy(artifact.target)?.let {
                "gate: %s, KL %.3f [%.3f, %.3f], top-1 %.1f%%".format(
                    it.verdict, it.klMean, it.klLow, it.klHigh, 100 * it.top1,
                )
            } ?: "gate: not validated when it was exported"
            lines += "sha256 ${bundle.artifactSha256(artifact.target).take(16)}…, verified before it is run"
        }
        val classifier = bundle.classifier
        if (classifier != null) {
            lines += "\nlabels: ${classifier.labels.joinToString { it.name }}"
            classifier.guard?.let { guard -> lines += guard.categories.map { "${it.code}: ${it.name}" } }
        } else if (bundle.chatFormat == null) lines += "\nno chat: ${bundle.noChatReason}"
        return lines.joinToString("\n")
    }

    private fun open(activity: Class<out Activity>) {
        startActivity(Intent(this, activity).putExtra(BUNDLE, chosen ?: return))
    }

    private fun pick() {
        startActivityForResult(Intent(OPEN_DOCUMENT_TREE), PICK)
    }

    override fun onActivityResult(request: Int, result: Int, data: Intent?) {
        super.onActivityResult(request, result, data)
        val tree = data?.data
        if (request != PICK || result != RESULT_OK || tree == null) return
        busy = true
        val context = applicationContext
        Worker.run({ finishedImport(null, it) }) {
            val bundle = Storage.import(context, tree) { name -> Worker.tell { summary.text = "Copying $name…" } }
            Worker.tell { finishedImport(bundle.directory.name, null) }
        }
    }

    private fun finishedImport(name: String?, error: String?) {
        busy = false
        if (name != null) chosen = name
        refresh()
        if (error != null) summary.text = error
    }

    private fun button(id: Int, action: () -> Unit): Button =
        view<Button>(id).also { it.setOnClickListener { _: View -> action() } }

    companion object {
        const val BUNDLE = "bundle"
        const val SCRIPT = "script"
        private const val CHOSEN = "chosen"
        private const val PICK = 1
        private const val OPEN_DOCUMENT_TREE = "android.intent.action.OPEN_DOCUMENT_TREE" // Intent's, since API 21
    }
}
