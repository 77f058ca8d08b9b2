import EdgeLlamaCore
import SwiftUI

@main
struct EdgeLlamaApp: App {
    private let command: CheckCommand? = CheckCommand(Array(ProcessInfo.processInfo.arguments.dropFirst()))

    var body: some Scene {
        WindowGroup {
            if let command: CheckCommand = command {
                CommandView(command: command)
            } else {
                BundleListView()
            }
        }
    }
}

/// What a person sees while a script's check runs.
private struct CommandView: View {
    let command: CheckCommand

    var body: some View {
        ProgressView("Accuracy check for a script")
            .task {
                let code: Int32 = await command.run()
                fflush(nil)
                exit(code)
            }
    }
}
