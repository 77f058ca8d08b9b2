package edgellama.core

/** A parsed JSON object with its place in a file, so that what is missing or of another type is named. */
class JsonObject(private val values: Map<String, Any?>, private val where: String) {
    val names: Set<String> get() = values.keys

    fun string(name: String): String = get(name, "a string")

    fun boolean(name: String): Boolean = get(name, "true or false")

    fun double(name: String): Double = get<Number>(name, "a number").toDouble()

    fun long(name: String): Long = get(name, "a whole number")

    fun int(name: String): Int {
        val value = long(name)
        if (value < Int.MIN_VALUE || value > Int.MAX_VALUE) throw BundleException("$where.$name is out of bounds")
        return value.toInt()
    }

    fun objectOf(name: String): JsonObject = JsonObject(get(name, "an object"), "$where.$name")

    fun objectOrNull(name: String): JsonObject? = if (values[name] == null) null else objectOf(name)

    fun stringOrNull(name: String): String? = if (values[name] == null) null else string(name)

    fun objects(name: String): List<JsonObject> = get<List<*>>(name, "a list").mapIndexed { i, value ->
        @Suppress("UNCHECKED_CAST")
        JsonObject(value as? Map<String, Any?> ?: wrong("$name[$i]", "an object"), "$where.$name[$i]")
    }

    fun ints(name: String): IntArray = get<List<*>>(name, "a list").map {
        val value = it as? Long ?: wrong(name, "a list of whole numbers")
        if (value < 0 || value > Int.MAX_VALUE) throw BundleException("$where.$name is out of bounds")
        value.toInt()
    }.toIntArray()

    fun isNull(name: String): Boolean = values[name] == null

    fun doubles(name: String): List<Double> = list(name).map {
        (it as? Number ?: wrong(name, "a list of numbers")).toDouble()
    }

    fun list(name: String): List<Any?> = get(name, "a list")

    fun booleanOr(name: String, default: Boolean): Boolean = if (values[name] == null) default else boolean(name)

    /** Every value as an object, by name. */
    fun entries(): Map<String, JsonObject> = values.keys.associateWith { objectOf(it) }

    private inline fun <reified T> get(name: String, kind: String): T = values[name] as? T ?: wrong(name, kind)

    private fun wrong(name: String, kind: String): Nothing = throw BundleException("$where.$name is not $kind")

    companion object {
        /** The object in the JSON [text] of the file called [name]. Throws [BundleException]. */
        fun parse(text: String, name: String): JsonObject {
            val value = try {
                Json.parse(text)
            } catch (error: JsonException) {
                throw BundleException("$name: ${error.message}", cause = error)
            }
            @Suppress("UNCHECKED_CAST")
            return JsonObject(value as? Map<String, Any?> ?: throw BundleException("$name is not an object"), name)
        }
    }
}
