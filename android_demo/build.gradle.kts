plugins {
    alias(libs.plugins.android.application) apply false
    alias(libs.plugins.kotlin.android) apply false
    alias(libs.plugins.kotlin.jvm) apply false
}

// A bundle as a build step: gradle exportModel -Pmodel=/path/to/model [-Precipe=int8] [-Pedgellama=/path/to/edgellama]
// It is up to date while the checkpoint's files, the recipe and edgellama's version stay what they were.
val modelPath = providers.gradleProperty("model")
val recipeName = providers.gradleProperty("recipe").orElse("int4-fast")
val edgellama = providers.gradleProperty("edgellama").orElse("edgellama")
val bundleName = providers.gradleProperty("bundle").orElse("model")
val bundle = layout.buildDirectory.dir(bundleName.map { "bundles/$it.edgellama" })

val exportModel = tasks.register<Exec>("exportModel") {
    group = "edgellama"
    description = "Quantizes, lowers and validates the checkpoint -Pmodel to a bundle."
    inputs.files(modelPath.map { path -> file(path).let { if (it.isDirectory) fileTree(it) else files(it) } })
        .withPropertyName("model")
        .withPathSensitivity(PathSensitivity.RELATIVE)
    inputs.property("recipe", recipeName)
    inputs.property("version", providers.exec { commandLine(edgellama.get(), "--version") }.standardOutput.asText)
    outputs.dir(bundle)
    commandLine(
        edgellama.get(), "export", modelPath.getOrElse("-Pmodel=/path/to/checkpoint is missing"),
        "-t", "xnnpack", "-r", recipeName.get(), "-o", bundle.get().asFile.path, "--force",
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
