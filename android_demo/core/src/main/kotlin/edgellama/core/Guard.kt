package edgellama.core

/** Text around the messages of a conversation whose last message a guard judges. */
class GuardConversation(
    /** Text before the first message and after the last one, by the role of the last. */
    private val before: Map<Role, String>,
    private val after: Map<Role, String>,
    /** Text between two messages, by the role of the second. */
    private val between: Map<Role, String>,
    private val trim: Boolean,
) {
    /** The text in parts. Throws [TokenizerException] unless user and assistant speak in turn, the user first. */
    fun parts(messages: List<Message>): List<TextPart> {
        val inTurn = messages.withIndex().all { (i, m) -> m.role == if (i % 2 == 0) Role.USER else Role.ASSISTANT }
        if (messages.isEmpty() || !inTurn) {
            throw TokenizerException(
                "the conversation has the roles ${messages.map { it.role.label }}",
                "Give messages of user and assistant in turn, user first; the last one is judged.",
            )
        }
        val judged = messages.last().role
        val parts = arrayListOf(TextPart(before.getValue(judged), false))
        messages.forEachIndexed { i, message ->
            if (i > 0) parts.add(TextPart(between.getValue(message.role), false))
            parts.add(TextPart(if (trim) ChatFormat.strip(message.content) else message.content, true))
        }
        return parts + TextPart(after.getValue(judged), false)
    }

    companion object {
        fun of(json: JsonObject) = GuardConversation(
            byRole(json.objectOf("before")),
            byRole(json.objectOf("after")),
            mapOf(Role.ASSISTANT to json.string("to_assistant"), Role.USER to json.string("to_user")),
            json.boolean("trim"),
        )

        private fun byRole(json: JsonObject) =
            listOf(Role.USER, Role.ASSISTANT).associateWith { json.string(it.label) }
    }
}

/** A category of the policy. [first]: tokens of its code as the first of an answer, [further]: after another one. */
class Category(val code: String, val name: String, val first: List<Int>, val further: List<Int>)

/** The section `guard` of a classifier: the conversation that is judged, and the tokens of the answers. */
class Guard(
    val conversation: GuardConversation,
    val categories: List<Category>,
    /** Tokens of `unsafe` after its first one. */
    private val rest: List<Int>,
    /** Tokens that end an answer. */
    private val end: List<Int>,
) {
    /** Tokens of all answers but the first, sorted. */
    val tokens: List<Int> = (rest + end + categories.flatMap { it.first + it.further }).distinct().sorted()

    /** Codes that an answer may come to have, with the tokens that are still missing. */
    private class Open(val codes: List<String>, val missing: List<Int>)

    /** An answer after some tokens. [codes] are complete. */
    inner class Answer private constructor(private val open: List<Open>, val codes: List<String>) {
        /** The answer after the first token of `unsafe`. */
        internal constructor() : this(categories.map { Open(listOf(it.code), rest + it.first) }, emptyList())

        /** Tokens that may follow, sorted: those of codes that were not given yet, or an end after a whole code. */
        fun allowed(): List<Int> = continuations().map { it.first }.distinct().sorted()

        /** The answer with one more of the allowed tokens; null at its end. */
        fun then(token: Int): Answer? {
            if (token in end) return null
            val states = continuations().filter { it.first == token }.mapNotNull { it.second }
            return Answer(states, states.firstOrNull { it.missing.isEmpty() }?.codes ?: codes)
        }

        private fun continuations(): List<Pair<Int, Open?>> = open.flatMap { state ->
            if (state.missing.isNotEmpty()) {
                listOf(state.missing[0] to Open(state.codes, state.missing.drop(1)))
            } else {
                end.map { it to null } + categories.filter { it.code !in state.codes }
                    .map { it.further[0] to Open(state.codes + it.code, it.further.drop(1)) }
            }
        }
    }

    companion object {
        const val UNSAFE = "unsafe"
        const val CALLS = 6 // at most, after the prefill; a call chooses a token, tokens without a choice go with it

        /** The guard in the section [json]. Throws [BundleException] for one that this app cannot read. */
        fun of(json: JsonObject): Guard {
            val categories = json.objects("categories").map {
                Category(it.string("code"), it.string("name"), tokens(it, "first"), tokens(it, "further"))
            }
            if (categories.isEmpty() || categories.any { it.code.isBlank() }) {
                throw Classifier.wrong("its guard has ${categories.size} categories, and needs one or more with a code")
            }
            val rest = json.ints("rest").toList()
            return Guard(GuardConversation.of(json.objectOf("conversation")), categories, rest, tokens(json, "end"))
        }

        private fun tokens(json: JsonObject, name: String): List<Int> =
            json.ints(name).toList().ifEmpty { throw Classifier.wrong("its guard has no tokens in $name") }
    }
}
