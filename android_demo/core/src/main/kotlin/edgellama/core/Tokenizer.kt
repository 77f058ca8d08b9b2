package edgellama.core

import java.util.BitSet

/** A piece of a text. Control tokens in a [typed] one are text, because a person or a model wrote it. */
data class TextPart(val text: String, val typed: Boolean)

/** Byte-level BPE, as a bundle's tokenizer.json describes it: the same ids and the same text as in Python. */
class Tokenizer private constructor(
    private val vocab: Map<String, Int>,
    private val pieces: Array<String?>,
    private val merges: Merges,
    private val ignoreMerges: Boolean,
    internal val preTokenizer: PreTokenizer,
    private val added: List<List<AddedToken>>,
    private val special: Set<Int>,
    private val before: IntArray,
    private val after: IntArray,
) {
    private val byteIds = IntArray(256) { vocab[ByteLevel.character[it].toString()] ?: -1 }

    /** Token ids of [text]; special tokens written in it become their ids. A chat wants no [addSpecialTokens]. */
    fun encode(text: String, addSpecialTokens: Boolean = true): IntArray {
        val ids = ArrayList<Int>()
        if (addSpecialTokens) before.forEach(ids::add)
        encode(text, 0, text.length, BitSet(), 0, ids)
        if (addSpecialTokens) after.forEach(ids::add)
        return ids.toIntArray()
    }

    /**
     * Token ids of the joined [parts]. Control tokens become their ids outside of typed parts only. A chat wants no
     * [addSpecialTokens].
     */
    fun encode(parts: List<TextPart>, addSpecialTokens: Boolean = false): IntArray {
        val typed = BitSet()
        var end = 0
        for (part in parts) {
            val start = end
            end += part.text.length
            if (part.typed) typed.set(start, end)
        }
        val ids = ArrayList<Int>()
        if (addSpecialTokens) before.forEach(ids::add)
        encode(parts.joinToString("") { it.text }, 0, end, typed, 0, ids)
        if (addSpecialTokens) after.forEach(ids::add)
        return ids.toIntArray()
    }

    /** The text of [ids], special tokens left out. */
    fun decode(ids: IntArray): String = stream().let { s -> ids.joinToString("") { s.push(it) } + s.flush() }

    /** A decoder for ids that arrive one by one. */
    fun stream(): TokenStream = TokenStream { id ->
        if (id in special || id !in pieces.indices) null else pieces[id]?.let(ByteLevel::bytesOf)
    }

    /** Finds the added tokens of each pass in turn, and encodes what is between them. */
    private fun encode(text: String, from: Int, to: Int, typed: BitSet, pass: Int, ids: MutableList<Int>) {
        if (from == to) return
        if (pass == added.size) return words(text.substring(from, to), ids)
        var start = from
        var at = from
        while (at < to) {
            val token = added[pass].firstOrNull { fits(it, text, at, to, typed) }
            if (token == null) {
                at++
                continue
            }
            encode(text, start, at, typed, pass + 1, ids)
            ids.add(token.id)
            at += token.content.length
            start = at
        }
        encode(text, start, to, typed, pass + 1, ids)
    }

    private fun fits(token: AddedToken, text: String, at: Int, to: Int, typed: BitSet): Boolean {
        val end = at + token.content.length
        if (end > to || !text.startsWith(token.content, at)) return false
        return !token.special || typed.nextSetBit(at) !in at until end
    }

    private fun words(text: String, ids: MutableList<Int>) {
        val points = text.codePoints().toArray()
        var start = 0
        for (end in preTokenizer.ends(points)) {
            val bytes = String(points, start, end - start).toByteArray(Charsets.UTF_8)
            start = end
            val whole = if (ignoreMerges) vocab[String(CharArray(bytes.size) { character(bytes[it]) })] else null
            if (whole != null) {
                ids.add(whole)
            } else {
                val symbols = bytes.map { byteIds[it.toInt() and 0xff] }.filter { it >= 0 }.toIntArray()
                merges.apply(symbols).forEach(ids::add)
            }
        }
    }

    private fun character(byte: Byte) = ByteLevel.character[byte.toInt() and 0xff]

    companion object {
        /** The tokenizer in the text of a tokenizer.json. Throws an [EdgeLlamaException] when it is of another kind. */
        fun parse(text: String): Tokenizer {
            val json = JsonObject.parse(text, "tokenizer.json")
            val model = json.objectOf("model")
            if (model.string("type") != "BPE" || json.objectOrNull("decoder")?.string("type") != "ByteLevel") {
                throw unsupported("its model is not a byte-level BPE")
            }
            if (json.objectOrNull("normalizer") != null) throw unsupported("it changes text before splitting it")
            val vocab = vocabOf(model)
            val added = json.objects("added_tokens").map(AddedToken::of)
            val size = maxOf(vocab.values.maxOrNull() ?: -1, added.maxOfOrNull { it.id } ?: -1) + 1
            val pieces = arrayOfNulls<String>(size)
            for ((piece, id) in vocab) pieces[id] = piece
            for (token in added) pieces[token.id] = token.content
            val (before, after) = around(json.objectOrNull("post_processor"))
            return Tokenizer(
                vocab,
                pieces,
                mergesOf(model, vocab),
                model.booleanOr("ignore_merges", false),
                PreTokenizer.of(json.objectOrNull("pre_tokenizer")),
                // The longest first, so that the first that fits is the longest.
                listOf(false, true).map { pass ->
                    added.filter { it.normalized == pass }.sortedByDescending { it.content.length }
                },
                added.filter { it.special }.map { it.id }.toSet(),
                before,
                after,
            )
        }

        private fun vocabOf(model: JsonObject): Map<String, Int> {
            val json = model.objectOf("vocab")
            val vocab = HashMap<String, Int>(json.names.size * 2)
            for (piece in json.names) vocab[piece] = json.int(piece)
            if (vocab.values.any { it < 0 || it > MAX_ID }) throw unsupported("it has token ids out of bounds")
            return vocab
        }

        private fun mergesOf(model: JsonObject, vocab: Map<String, Int>): Merges {
            val list = model.list("merges")
            val merges = Merges(list.size)
            list.forEachIndexed { rank, merge ->
                // "left right" or ["left", "right"]
                val pair = if (merge is String) merge.split(' ', limit = 2) else merge as? List<*>
                val left = vocab[pair?.getOrNull(0)]
                val right = vocab[pair?.getOrNull(1)]
                val joined = vocab["${pair?.getOrNull(0)}${pair?.getOrNull(1)}"]
                if (left == null || right == null || joined == null) {
                    throw TokenizerException("tokenizer.json: merge $rank is not of tokens in the vocabulary")
                }
                merges.add(left, right, rank, joined)
            }
            return merges
        }

        /** Ids that the post-processor puts before and after a text. */
        private fun around(json: JsonObject?): Pair<IntArray, IntArray> {
            val steps = when (json?.string("type")) {
                null, "ByteLevel" -> emptyList()
                "Sequence" -> json.objects("processors").filter { it.string("type") != "ByteLevel" }
                else -> listOf(json)
            }
            if (steps.isEmpty()) return IntArray(0) to IntArray(0)
            val template = steps.singleOrNull()?.takeIf { it.string("type") == "TemplateProcessing" }
                ?: throw unsupported("it adds special tokens in an unknown way")
            val known = template.objectOf("special_tokens")
            val before = ArrayList<Int>()
            val after = ArrayList<Int>()
            var seen = false
            for (step in template.objects("single")) {
                val token = step.objectOrNull("SpecialToken")
                if (token == null) seen = true else {
                    val ids = known.objectOf(token.string("id")).ints("ids")
                    (if (seen) after else before).addAll(ids.toList())
                }
            }
            return before.toIntArray() to after.toIntArray()
        }

        private fun unsupported(reason: String) = TokenizerException(
            "this app cannot use this tokenizer: $reason",
            "Use a model with a byte-level tokenizer, such as SmolLM2 or Llama 3.",
        )

        private const val MAX_ID = 1 shl 22
    }
}

/** A token that is found in a text before anything is split. */
internal class AddedToken(val id: Int, val content: String, val special: Boolean, val normalized: Boolean) {
    companion object {
        fun of(json: JsonObject): AddedToken {
            val token = AddedToken(
                json.int("id"), json.string("content"), json.boolean("special"), json.boolean("normalized"),
            )
            val strips = listOf("lstrip", "rstrip", "single_word").filter { json.boolean(it) }
            if (strips.isNotEmpty() || token.content.isEmpty() || token.id < 0) {
                throw TokenizerException("this app cannot find the token '${token.content}' as tokenizer.json says")
            }
            return token
        }
    }
}

/** Text of ids that arrive one by one; the pieces joined are the text of all of them. */
class TokenStream internal constructor(private val bytesOf: (Int) -> ByteArray?) {
    private val utf8 = Utf8Decoder()

    /** The text that became certain with this token: half a character waits for its other half. */
    fun push(id: Int): String = bytesOf(id)?.let(utf8::push) ?: ""

    /** What was still waiting. */
    fun flush(): String = utf8.flush()
}
