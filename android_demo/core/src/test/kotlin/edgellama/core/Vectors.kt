package edgellama.core

import java.io.File

/** tests/vectors, written by Python: what every language computes. */
internal object Vectors {
    val directory = File(System.getProperty("edgellama.vectors") ?: "../../tests/vectors")

    fun json(name: String): JsonObject = JsonObject.parse(File(directory, name).readText(), name)

    fun tokenizer(name: String): Tokenizer =
        Tokenizer.parse(File(directory, json("encode.json").objectOf("tokenizers").string(name)).readText())

    fun bundle(): Bundle = Bundle.open(File(directory, "bundle"))

    fun messages(json: JsonObject): List<Message> = json.objects("messages").map { message ->
        Message(Role.entries.first { it.label == message.string("role") }, message.string("content"))
    }
}
