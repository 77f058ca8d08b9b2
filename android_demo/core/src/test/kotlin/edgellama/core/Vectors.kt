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

    /** Puts another section `classifier` into a bundle's manifest, and other rows into its model; null for none. */
    fun classify(directory: File, section: Any?, rows: Any?) {
        val file = File(directory, Bundle.MANIFEST)
        val manifest = HashMap(Json.parse(file.readText()) as Map<*, *>)
        val model = HashMap(manifest["model"] as Map<*, *>)
        if (rows == null) model.remove("label_rows") else model["label_rows"] = rows
        manifest["model"] = model
        if (section == null) manifest.remove("classifier") else manifest["classifier"] = section
        file.writeText(Json.write(manifest))
    }
}
