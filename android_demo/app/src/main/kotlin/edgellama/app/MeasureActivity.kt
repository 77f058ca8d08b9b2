package edgellama.app

import android.app.Activity
import android.content.Intent
import android.os.Bundle
import android.util.Log
import android.widget.Button
import android.widget.ProgressBar
import android.widget.TextView
import java.io.File

/** What the screens of check and benchmark share: start and stop, progress, a text, a result to share. */
abstract class MeasureActivity(private val layout: Int, private val screen: Screen) : Activity() {
    protected lateinit var bundle: File
    private var script = false

    override fun onCreate(state: Bundle?) {
        super.onCreate(state)
        setContentView(layout)
        val name = intent.getStringExtra(MainActivity.BUNDLE)
        if (name == null || name.contains('/') || name == "..") return finish()
        bundle = File(Storage.bundles, name)
        script = intent.getBooleanExtra(MainActivity.SCRIPT, false)
        view<Button>(R.id.start).setOnClickListener { if (busy) stop() else start() }
        view<Button>(R.id.share).setOnClickListener { share() }
        open()
        if (script && state == null) start()
    }

    override fun onStart() {
        super.onStart()
        if (!isFinishing) screen.observe(::render)
    }

    /** A measurement in the background would be of a slowed down processor. */
    override fun onStop() {
        super.onStop()
        screen.release()
        if (!isChangingConfigurations) stop()
    }

    private fun render() {
        view<TextView>(R.id.result).text = listOfNotNull(text, screen.error).joinToString("\n")
        view<Button>(R.id.start).setText(if (busy) R.string.stop else R.string.start)
        view<Button>(R.id.share).isEnabled = json != null
        val (done, all) = progress
        view<ProgressBar>(R.id.progress).let {
            it.max = all
            it.progress = done
        }
        keepScreenOn(busy)
        val outcome = outcome
        if (script && !busy && outcome != null) {
            script = false
            Log.i(TAG, outcome)
            finish()
        }
    }

    private fun share() {
        val text = json ?: return
        val send = Intent(Intent.ACTION_SEND).setType("application/json").putExtra(Intent.EXTRA_TEXT, text)
        startActivity(Intent.createChooser(send, getString(R.string.share)))
    }

    protected abstract val busy: Boolean
    protected abstract val text: String
    protected abstract val json: String?
    protected abstract val progress: Pair<Int, Int>

    /** The line for a script's log once there is a result or an error; null before. */
    protected abstract val outcome: String?

    protected abstract fun open()

    protected abstract fun start()

    protected abstract fun stop()

    private companion object {
        const val TAG = "edgellama"
    }
}
