package edgellama.app

import android.app.Activity
import android.app.AlertDialog
import android.os.Bundle
import android.view.Gravity
import android.view.View
import android.widget.Button
import android.widget.EditText
import android.widget.LinearLayout
import android.widget.ProgressBar
import android.widget.ScrollView
import android.widget.TextView
import java.io.File

class ChatActivity : Activity() {
    private lateinit var messages: LinearLayout
    private lateinit var input: EditText
    private lateinit var send: Button

    override fun onCreate(state: Bundle?) {
        super.onCreate(state)
        setContentView(R.layout.chat)
        messages = view(R.id.messages)
        input = view(R.id.input)
        send = view(R.id.send)
        val name = intent.getStringExtra(MainActivity.BUNDLE) ?: return finish()
        title = name
        ChatScreen.open(File(Storage.bundles, name))
        send.setOnClickListener { sendOrStop() }
        view<Button>(R.id.clear).setOnClickListener { ChatScreen.clear() }
        view<Button>(R.id.settings).setOnClickListener { settings() }
    }

    override fun onStart() {
        super.onStart()
        ChatScreen.observe(::render)
    }

    /** An answer that nobody sees costs battery; a rotation is no reason to end it. */
    override fun onStop() {
        super.onStop()
        ChatScreen.release()
        if (!isChangingConfigurations) ChatScreen.stop()
    }

    private fun sendOrStop() {
        if (ChatScreen.busy) return ChatScreen.stop()
        ChatScreen.send(input.text.toString())
        input.setText("")
    }

    private fun render() {
        val lines = ChatScreen.lines
        while (messages.childCount > lines.size) messages.removeViewAt(messages.childCount - 1)
        lines.forEachIndexed { i, line ->
            val view = messages.getChildAt(i) as TextView? ?: TextView(this).also(messages::addView)
            view.setTextIsSelectable(true)
            view.textSize = TEXT_SIZE
            view.setPadding(0, PADDING, 0, PADDING)
            view.gravity = if (line.fromUser) Gravity.END else Gravity.START
            if (view.text.toString() != line.text) view.text = line.text
        }
        view<TextView>(R.id.status).text = ChatScreen.error ?: ChatScreen.status
        val (used, whole) = ChatScreen.context
        view<ProgressBar>(R.id.context).let {
            it.max = whole
            it.progress = used
        }
        send.setText(if (ChatScreen.busy) R.string.stop else R.string.send)
        keepScreenOn(ChatScreen.busy)
        view<ScrollView>(R.id.scroll).let { scroll -> scroll.post { scroll.fullScroll(View.FOCUS_DOWN) } }
    }

    private fun settings() {
        val view = layoutInflater.inflate(R.layout.settings, null)
        val old = ChatScreen.settings
        fun field(id: Int) = view.view<EditText>(id)
        field(R.id.system).setText(old.system)
        field(R.id.temperature).setText(old.temperature.toString())
        field(R.id.top_p).setText(old.topP.toString())
        field(R.id.seed).setText(old.seed.toString())
        field(R.id.max_tokens).setText(old.maxTokens.toString())
        fun text(id: Int) = field(id).text.toString()
        AlertDialog.Builder(this)
            .setTitle(R.string.settings)
            .setView(view)
            .setNegativeButton(R.string.close, null)
            .setPositiveButton(R.string.save) { _, _ ->
                // What is no number, or out of bounds, leaves the old value.
                ChatScreen.apply(
                    ChatSettings(
                        text(R.id.system),
                        text(R.id.temperature).toDoubleOrNull()?.takeIf { it in 0.0..100.0 } ?: old.temperature,
                        text(R.id.top_p).toDoubleOrNull()?.takeIf { it > 0 && it <= 1 } ?: old.topP,
                        text(R.id.seed).toLongOrNull()?.takeIf { it >= 0 } ?: old.seed,
                        text(R.id.max_tokens).toIntOrNull()?.takeIf { it > 0 } ?: old.maxTokens,
                    ),
                )
            }
            .show()
    }

    private companion object {
        const val TEXT_SIZE = 16f
        const val PADDING = 12
    }
}
