package edgellama.core

import java.io.DataInputStream
import java.io.EOFException
import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder

/** A model that another process runs: tests/helpers/logits_server.py, which has the .pte in ExecuTorch. */
internal class ProcessModel(command: List<String>) : LogitsModel {
    private val process = ProcessBuilder(command).redirectError(ProcessBuilder.Redirect.INHERIT).start()
    private val input = DataInputStream(process.inputStream.buffered())
    private val output = process.outputStream.buffered()
    override val vocabSize = ints(1)[0]
    override val contextLength = ints(1)[0]
    override val outputSize = ints(1)[0]
    override val runtime = "executorch by a process"

    override fun forward(tokens: IntArray, position: Int): FloatArray {
        val request = ByteBuffer.allocate(8 + 4 * tokens.size).order(ByteOrder.LITTLE_ENDIAN)
        request.putInt(position).putInt(tokens.size)
        tokens.forEach(request::putInt)
        output.write(request.array())
        output.flush()
        val bytes = read(4 * outputSize)
        return FloatArray(outputSize) { bytes.getFloat() }
    }

    override fun close() {
        output.close()
        process.waitFor()
    }

    private fun ints(count: Int): IntArray = read(4 * count).let { bytes -> IntArray(count) { bytes.getInt() } }

    private fun read(size: Int): ByteBuffer {
        val bytes = ByteArray(size)
        try {
            input.readFully(bytes)
        } catch (error: EOFException) {
            throw ModelException("the server ended (code ${process.waitFor()})", "Read what it wrote.", error)
        }
        return ByteBuffer.wrap(bytes).order(ByteOrder.LITTLE_ENDIAN)
    }
}

/**
 * What the app does with a bundle, on a JVM, for tests/apps/test_android_end_to_end.py. Arguments: the bundle, a file for
 * the result, how many tokens to generate, a file with a JSON list of prompts, then the command of the server.
 */
internal object EndToEnd {
    @JvmStatic
    fun main(args: Array<String>) {
        val bundle = Bundle.open(File(args[0]))
        bundle.file(bundle.artifact("xnnpack").path)
        val tokenizer = bundle.tokenizer()
        val prompts = (Json.parse(File(args[3]).readText()) as List<*>).map { it as String }
        val start = System.nanoTime()
        ProcessModel(args.drop(4)).use { model ->
            val loadMillis = (System.nanoTime() - start) / 1e6
            check(model.vocabSize == bundle.vocabSize && model.contextLength == bundle.contextLength)
            check(model.outputSize == bundle.outputSize)
            val answers = if (bundle.classifier == null) texts(bundle, model, tokenizer, prompts, args[2].toInt())
            else labels(bundle, model, tokenizer, prompts)
            val result = GoldenCheck(bundle, "xnnpack", Processor.of("").kind).run(model, tokenizer)!!
            val log = Json.parse(result.toJson(Device("JVM ${System.getProperty("java.version")}", System.getProperty("os.name")), loadMillis, null))
            val ids = prompts.map { encode(bundle, tokenizer, it).toList() }
            File(args[1]).writeText(Json.write(mapOf("answers" to answers, "ids" to ids, "log" to log)))
        }
    }

    private fun encode(bundle: Bundle, tokenizer: Tokenizer, text: String): IntArray =
        if (bundle.classifier == null) tokenizer.encode(text) else TextClassifier.of(bundle, "xnnpack", tokenizer).encode(text)

    private fun texts(bundle: Bundle, model: LogitsModel, tokenizer: Tokenizer, prompts: List<String>, count: Int): List<String> {
        val generator = Generator(Session(model), tokenizer, bundle.stopIds)
        return prompts.map { prompt ->
            val text = StringBuilder()
            generator.generate(tokenizer.encode(prompt), Sampler(), count) { piece, _ -> text.append(piece) }
            text.toString()
        }
    }

    private fun labels(bundle: Bundle, model: LogitsModel, tokenizer: Tokenizer, prompts: List<String>): List<Any> {
        val judge by lazy { TextClassifier.of(bundle, "xnnpack", tokenizer) } // refuses a bundle that was altered
        val session = Session(model)
        return prompts.map { prompt ->
            val answer = judge.classify(session, prompt)!!
            val found = mapOf(
                "label" to answer.label,
                "probabilities" to answer.probabilities.toMap(),
                "flagged" to answer.flagged,
                "tokens" to answer.tokens,
            )
            answer.categories?.let { found + ("categories" to it) } ?: found
        }
    }
}
