package edgellama.app

import android.content.Context
import android.net.Uri
import android.provider.DocumentsContract
import android.provider.DocumentsContract.Document
import edgellama.core.Bundle
import edgellama.core.BundleException
import edgellama.core.EdgeLlamaException
import edgellama.core.FileVersions
import edgellama.core.Trust
import edgellama.core.Versions
import java.io.File
import java.io.IOException

/** Where bundles and results lie: the app's own directory, which adb can write to and no other app can read. */
object Storage {
    private lateinit var root: File
    private lateinit var publicKey: String
    private var versions: Versions? = null

    /** Whose bundles this app loads, as res/values/trust.xml says; null for everybody's. */
    private val trust: Trust? by lazy { Trust.of(publicKey, versions) }

    fun open(context: Context) {
        publicKey = context.getString(R.string.bundle_public_key)
        if (context.resources.getBoolean(R.bool.bundle_version_may_not_fall)) {
            versions = FileVersions(File(context.filesDir, "versions.json"))
        }
        root = context.getExternalFilesDir(null) ?: context.filesDir
        bundles.mkdirs()
        results.mkdirs()
        challenges.mkdirs()
    }

    val bundles: File get() = File(root, "bundles")
    val results: File get() = File(root, "results")
    val challenges: File get() = File(root, "challenges")

    /** Where the challenge for the bundle at [bundle] lies, pushed by adb or picked by a person. */
    fun challenge(bundle: File) = File(challenges, "${bundle.name}-challenge.json")

    /** The bundle at [directory], of those that this app trusts. Throws an [EdgeLlamaException]. */
    fun bundle(directory: File): Bundle = Bundle.open(directory, trust)

    /** Notes that [bundle] runs: the app may refuse older versions of it from now on. */
    fun loaded(bundle: Bundle) {
        trust?.loaded(bundle)
    }

    /** Directories that may be bundles, by name. */
    fun list(): List<File> =
        bundles.listFiles { file -> file.isDirectory && !file.name.startsWith(".") }.orEmpty().sortedBy { it.name }

    /** Writes a result for scripts to fetch: a whole file or none. */
    fun write(name: String, text: String): File {
        val file = File(results, name)
        val part = File(results, "$name.part")
        part.writeText(text)
        if (!part.renameTo(file)) throw IOException("$file cannot be written")
        return file
    }

    /** Writes why there is no result, for scripts; the person reads it on the screen. */
    fun writeError(name: String, reason: String) {
        try {
            write(name, reason)
        } catch (_: IOException) {
            // Then a script hears nothing but the log.
        }
    }

    /** Copies the challenge that a person picked for the bundle at [bundle]. */
    fun importChallenge(context: Context, picked: Uri, bundle: File) = fromProvider {
        val source = context.contentResolver.openInputStream(picked) ?: throw IOException("the file cannot be opened")
        source.use { input -> challenge(bundle).outputStream().use { input.copyTo(it) } }
    }

    /** Copies the directory that a person picked, and checks that it is a bundle. [onFile] hears each file's name. */
    fun import(context: Context, tree: Uri, onFile: (String) -> Unit): Bundle = fromProvider {
        val id = DocumentsContract.getTreeDocumentId(tree)
        val name = id.substringAfterLast('/').substringAfterLast(':').ifEmpty { "bundle" }
        val part = File(bundles, ".$name")
        val target = File(bundles, name)
        try {
            part.deleteRecursively()
            copy(context, tree, id, part, onFile)
            bundle(part)
            target.deleteRecursively()
            if (!part.renameTo(target)) throw IOException("$target cannot be written")
        } finally {
            part.deleteRecursively()
        }
        bundle(target)
    }

    /**
     * Runs [body], which asks another app for documents. That app runs elsewhere and may throw anything, now or when
     * its process dies; this one then says so and goes on.
     */
    private fun <T> fromProvider(body: () -> T): T = try {
        body()
    } catch (error: EdgeLlamaException) {
        throw error
    } catch (error: RuntimeException) {
        throw IOException("the app that holds the documents failed: ${error.message ?: error.javaClass.simpleName}", error)
    }

    private fun copy(context: Context, tree: Uri, id: String, directory: File, onFile: (String) -> Unit) {
        if (!directory.mkdirs()) throw IOException("$directory cannot be made")
        for ((child, name, isDirectory) in children(context, tree, id)) {
            if (name.contains('/') || name == "." || name == "..") throw BundleException("a file is called \"$name\"")
            val target = File(directory, name)
            if (isDirectory) {
                copy(context, tree, child, target, onFile)
            } else {
                onFile(name)
                val source = context.contentResolver.openInputStream(DocumentsContract.buildDocumentUriUsingTree(tree, child))
                    ?: throw IOException("$name cannot be opened")
                source.use { input -> target.outputStream().use { input.copyTo(it) } }
            }
        }
    }

    private fun children(context: Context, tree: Uri, id: String): List<Triple<String, String, Boolean>> {
        val columns = arrayOf(Document.COLUMN_DOCUMENT_ID, Document.COLUMN_DISPLAY_NAME, Document.COLUMN_MIME_TYPE)
        val found = ArrayList<Triple<String, String, Boolean>>()
        val uri = DocumentsContract.buildChildDocumentsUriUsingTree(tree, id)
        val cursor = context.contentResolver.query(uri, columns, null, null, null)
            ?: throw IOException("the directory cannot be listed")
        cursor.use {
            while (it.moveToNext()) {
                found.add(Triple(it.getString(0), it.getString(1), it.getString(2) == Document.MIME_TYPE_DIR))
            }
        }
        return found
    }
}
