package edgellama.app

import edgellama.core.Chat
import edgellama.core.EdgeLlamaException
import edgellama.core.Finish
import edgellama.core.Generator
import edgellama.core.Sampler
import edgellama.core.Stats
import edgellama.core.TokenizerException
import java.io.File

/** What a person may set. */
data class ChatSettings(
    val system: String = "",
    val temperature: Double = 0.0,
    val topP: Double = 1.0,
    val seed: Long = 0,
    val maxTokens: Int = 256,
)

class Line(val fromUser: Boolean, val text: String)

/** The chat, which goes on while activities come and go. */
object ChatScreen : Screen() {
    private var directory: File? = null
    private var chat: Chat? = null

    var settings = ChatSettings()
        private set
    var lines = emptyList<Line>()
        private set
    var status = ""
        private set

    /** Tokens in the context, and how many it holds. */
    var context = 0 to 1
        private set

    /** Shows the chat with the bundle at [bundle]; another bundle's chat is forgotten. */
    fun open(bundle: File) {
        if (bundle != directory) {
            directory = bundle
            clear()
        }
    }

    fun apply(settings: ChatSettings) {
        val system = settings.system != this.settings.system
        this.settings = settings
        if (system) clear() else changed() // the system prompt is at the head of a conversation
    }

    fun clear() {
        abandon()
        chat = null
        lines = emptyList()
        error = null
        status = ""
        context = 0 to context.second
        changed()
    }

    fun stop() {
        run?.stopped = true
    }

    fun send(text: String) {
        val bundle = directory
        if (busy || bundle == null || text.isBlank()) return
        val run = Run()
        this.run = run
        error = null
        lines = lines + Line(true, text) + Line(false, "")
        changed()
        val settings = settings
        val known = chat
        Worker.run({ if (run === this.run) failed(it) }) { answer(bundle, known, text, settings, run) }
    }

    private fun answer(directory: File, known: Chat?, text: String, settings: ChatSettings, run: Run) {
        val loaded = Models.load(directory) { step -> tell(run) { show(step) } }
        loaded.bundle.classifier?.let {
            throw TokenizerException("this model gives labels and writes no text", "Open the screen that classifies.")
        }
        val format = loaded.bundle.chatFormat ?: throw TokenizerException(
            "this model has no chat that an app can write: ${loaded.bundle.noChatReason}", "Use an instruction-tuned model.",
        )
        val chat = known ?: Chat(format, loaded.tokenizer, loaded.bundle.contextLength, settings.system)
        val sampler = Sampler(settings.temperature, settings.topP, settings.seed)
        val generator = Generator(loaded.session, loaded.tokenizer, loaded.bundle.stopIds)
        tell(run) { this.chat = chat }
        val answer = StringBuilder()
        try {
            val forgot = chat.forgets
            val prompt = chat.ask(text, settings.maxTokens)
            if (chat.forgets && !forgot) tell(run) { sayThatItForgets() }
            val generated = generator.generate(prompt, sampler, settings.maxTokens, { run.stopped }) { piece, _ ->
                answer.append(piece)
                val soFar = answer.toString()
                val tokens = loaded.session.position
                tell(run) { stream(soFar, tokens, loaded.bundle.contextLength) }
            }
            if (answer.isEmpty()) chat.withdraw() else chat.answered(answer.toString())
            tell(run) { finished(loaded, generated.finish, generated.stats) }
        } catch (error: EdgeLlamaException) {
            chat.withdraw()
            throw error
        }
    }

    private fun show(step: String) {
        status = step
        changed()
    }

    private fun sayThatItForgets() {
        lines = lines.dropLast(2) + Line(false, FORGETS) + lines.takeLast(2)
        changed()
    }

    private fun stream(text: String, tokens: Int, contextLength: Int) {
        lines = lines.dropLast(1) + Line(false, text)
        context = tokens to contextLength
        changed()
    }

    private fun finished(loaded: Loaded, finish: Finish, stats: Stats) {
        run = null
        val ending = if (finish == Finish.STOP) "" else " · ended: ${finish.label}"
        status = "load %.0f ms · first token %.0f ms · prefill %s (%d tokens, %d cached) · decode %s (%d tokens) · %s%s".format(
            loaded.loadMillis, stats.firstTokenMillis, perSecond(stats.prefillRate), stats.promptTokens, stats.cachedTokens,
            perSecond(stats.decodeRate), stats.generatedTokens, megabytes(Phone.usedBytes()), ending,
        )
        changed()
    }

    private fun failed(reason: String) {
        run = null
        lines = lines.dropLast(2)
        status = ""
        error = reason
        changed()
    }

    private const val FORGETS = "[the context is full: the oldest turns are left out from now on]"
}
