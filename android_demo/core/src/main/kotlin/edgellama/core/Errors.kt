package edgellama.core

/** What can go wrong, for a person: [message] says what and why, [remedy] what to do about it. */
open class EdgeLlamaException(message: String, val remedy: String, cause: Throwable? = null) :
    Exception(message, cause) {
    /** Both sentences. */
    val text: String get() = "$message\n$remedy"
}

/** Not a bundle, or files in it that are not what its manifest says. */
class BundleException(message: String, remedy: String = EXPORT_AGAIN, cause: Throwable? = null) :
    EdgeLlamaException(message, remedy, cause)

/** Tokenizer files, or a conversation, that cannot be used. */
class TokenizerException(message: String, remedy: String = EXPORT_AGAIN) : EdgeLlamaException(message, remedy)

/** The runtime cannot load or run the artifact. */
class ModelException(message: String, remedy: String, cause: Throwable? = null) :
    EdgeLlamaException(message, remedy, cause)

/** More tokens than the context holds. */
class ContextException(message: String) :
    EdgeLlamaException(message, "Clear the chat, shorten the text, or export with a larger --context.")

internal const val EXPORT_AGAIN = "Copy the whole bundle again, or export it again."
