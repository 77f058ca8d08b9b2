plugins {
    alias(libs.plugins.android.application) apply false
    alias(libs.plugins.kotlin.android) apply false
    alias(libs.plugins.kotlin.jvm) apply false
}

// A bundle as a build step: gradle exportModel -Pcheckpoint=/path/to/model [-Precipe=int8] [-PmaxKl=0.05] …
// The properties are those of edgellama/docs/pipelines.md. It is up to date while the checkpoint's files, the properties
// and edgellama's version stay what they were; the build fails when the gate does.
val edgellama = providers.gradleProperty("edgellama").orElse("edgellama")
val checkpoint = providers.gradleProperty("checkpoint")
val targets = providers.gradleProperty("targets").orElse("xnnpack")
val recipe = providers.gradleProperty("recipe").orElse("int4-fast")
val context = providers.gradleProperty("context").orElse("2048")
val maxKl = providers.gradleProperty("maxKl").orElse("")
val maxBytes = providers.gradleProperty("maxBytes").orElse("")
val bundleName = providers.gradleProperty("bundle").orElse("model")
val bundle = layout.buildDirectory.dir(bundleName.map { "bundles/$it.edgellama" })
val reports = layout.buildDirectory.dir(bundleName.map { "reports/edgellama/$it" })

val exportModel = tasks.register<Exec>("exportModel") {
    group = "edgellama"
    description = "Quantizes, lowers and validates the checkpoint -Pcheckpoint to a bundle."
    inputs.files(checkpoint.map { path -> file(path).let { if (it.isDirectory) fileTree(it) else files(it) } })
        .withPropertyName("checkpoint")
        .withPathSensitivity(PathSensitivity.RELATIVE)
    inputs.property("options", listOf(targets, recipe, context, maxKl, maxBytes).map { it.get() })
    inputs.property("version", providers.exec { commandLine(edgellama.get(), "--version") }.standardOutput.asText)
    outputs.dir(bundle)
    outputs.dir(reports)
    val report = reports.get().asFile.resolve("report").path
    commandLine(
        listOf(
            edgellama.get(), "export", checkpoint.getOrElse("-Pcheckpoint=/path/to/checkpoint is missing"),
            "--output", bundle.get().asFile.path, "--force", "--recipe", recipe.get(), "--context", context.get(),
            "--html", "$report.html", "--markdown", "$report.md", "--junit", "$report.xml",
        ) +
            targets.get().split(" ").filter { it.isNotEmpty() }.flatMap { listOf("--target", it) } +
            listOf("--max-kl" to maxKl.get(), "--max-bytes" to maxBytes.get())
                .filter { (_, value) -> value.isNotEmpty() }.flatMap { (option, value) -> listOf(option, value) },
    )
    // Gradle makes the directory of an output, and edgellama replaces bundles only.
    val directory = bundle.map { it.asFile }
    doFirst { if (directory.get().list().isNullOrEmpty()) directory.get().delete() }
}

// gradle pushBundle copies it to the device on adb, where the app lists it.
tasks.register<Exec>("pushBundle") {
    group = "edgellama"
    description = "Copies the exported bundle to the app's directory on the connected device."
    dependsOn(exportModel)
    commandLine(
        providers.gradleProperty("adb").orElse("adb").get(), "push", bundle.get().asFile.path,
        "/sdcard/Android/data/org.edgellama.demo/files/bundles/",
    )
}
